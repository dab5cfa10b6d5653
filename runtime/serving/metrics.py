"""What /metrics shows, in Prometheus' form: under vLLM's names where the meaning is the same, else under `diptych:`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.engine_stats import EngineStats
from runtime.serving.engine_client import EngineClient, EngineView, Prompt
from runtime.serving.event_log import EventLog

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
_LATENCY = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = tuple(float(2**i) for i in range(18))


@dataclass(slots=True)
class _Life:
    """What is known of a request that has not ended. Times are seconds of `time.monotonic`."""

    arrived: float
    num_prompt_tokens: int
    first_token: float | None = None
    last_token: float = 0.0
    num_tokens: int = 0


class ServerMetrics:
    """The server's metrics. The engine's are read from its client when somebody asks.

    Implements `runtime.serving.generation.Observer`.
    """

    def __init__(self, client: EngineClient, model: str) -> None:
        self.registry = CollectorRegistry()
        self.events: EventLog | None = None
        """Hears of arrivals and ends too, where there is one."""
        self.num_output_tokens = 0
        self._lives: dict[int, _Life] = {}
        labels = {"model_name": model, "engine": "0" if len(client.engines) == 1 else "all"}
        names = list(labels)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"vllm:{name}", text, names, buckets=buckets, registry=self.registry)
            return made.labels(*labels.values())

        def counter(name: str, text: str) -> Counter:
            return Counter(f"vllm:{name}", text, names, registry=self.registry).labels(*labels.values())

        self._ttft = histogram(
            "time_to_first_token_seconds", "From the arrival of the request, tokenising included", _TTFT
        )
        self._itl = histogram("inter_token_latency_seconds", "Between tokens of one request", _ITL)
        self._tpot = histogram("request_time_per_output_token_seconds", "Mean of one request", _ITL)
        self._e2e = histogram("e2e_request_latency_seconds", "From the arrival to the last token", _LATENCY)
        self._prompt_lengths = histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self._output_lengths = histogram("request_generation_tokens", "Output tokens of a request", _TOKENS)
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that were taken")
        self._output_tokens = counter("generation_tokens", "Output tokens")
        self._success = Counter(
            "vllm:request_success", "Requests by how they ended", [*names, "finished_reason"], registry=self.registry
        )
        self._rejected = Counter(
            "vllm:admission_rejections", "Requests refused with 503", [*names, "reason"], registry=self.registry
        )
        self._label_values = list(labels.values())
        self.registry.register(_EngineCollector(client, model))

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def alive(self) -> list[tuple[int, int]]:
        """(request id, output tokens so far) of those that have not ended."""
        return [(request_id, life.num_tokens) for request_id, life in self._lives.items()]

    def arrived(self, request_ids: Sequence[int], prompts: Sequence[Prompt], at: float) -> None:
        """Requests were handed in just now; `at`: when their HTTP request came."""
        if self.events is not None:
            self.events.arrived(request_ids, prompts)
        ids = iter(request_ids)
        for prompt in prompts:
            for _ in range(prompt.params.n):
                self._lives[next(ids)] = _Life(at, len(prompt.token_ids))
            self._prompt_tokens.inc(len(prompt.token_ids))

    def rejected(self, reason: str) -> None:
        """A request was refused for want of room."""
        self._rejected.labels(*self._label_values, reason).inc()

    def token(self, request_id: int, at: float, num_tokens: int) -> None:
        life = self._lives.get(request_id)
        if life is None or not num_tokens:
            return
        if life.first_token is None:
            life.first_token = at
            self._ttft.observe(at - life.arrived)
        else:
            self._itl.observe(at - life.last_token)
        life.last_token = at
        life.num_tokens += num_tokens
        self._output_tokens.inc(num_tokens)
        self.num_output_tokens += num_tokens

    def ended(self, request_id: int, at: float, reason: str) -> None:
        life = self._lives.pop(request_id, None)
        if life is None:
            return
        self._success.labels(*self._label_values, reason).inc()
        if self.events is not None:
            self.events.ended(request_id, at, life.first_token, life.num_tokens, reason)
        if reason in ("stop", "length") and life.first_token is not None:
            self._e2e.observe(at - life.arrived)
            self._prompt_lengths.observe(life.num_prompt_tokens)
            self._output_lengths.observe(life.num_tokens)
            if life.num_tokens > 1:
                self._tpot.observe((at - life.first_token) / (life.num_tokens - 1))


class _EngineCollector(Collector):
    """The counters and gauges of each engine as of its last step."""

    def __init__(self, client: EngineClient, model: str) -> None:
        self._client = client
        self._model = model
        self._started = time.time()

    def collect(self) -> Iterable[Metric]:
        engines = self._client.engines
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            for engine in engines:
                gauge.add_metric([self._model, str(engine.id)], read(engine))
            yield gauge
        for name, text, count in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=_LABELS, created=self._started)
            for engine in engines:
                counter.add_metric([self._model, str(engine.id)], count(engine.stats))
            yield counter
        host = CounterMetricFamily(
            "diptych:host_seconds", "Time of the engine's thread by part", labels=[*_LABELS, "part"]
        )
        for engine in engines:
            for part, ns in engine.stats.host_ns.items():
                host.add_metric([self._model, str(engine.id), part], ns / 1e9)
        yield host
        for name, text, value in (
            ("diptych:num_requests_queued", "Requests without a first token", self._client.num_queued[0]),
            ("diptych:num_queued_tokens", "Prompt tokens of those", self._client.num_queued[1]),
        ):
            queued = GaugeMetricFamily(name, text, labels=["model_name"])
            queued.add_metric([self._model], value)
            yield queued


def _kv_usage(engine: EngineView) -> float:
    """Share of blocks that are held; before the first step nothing is known, and nothing held."""
    return 1 - engine.stats.num_free_blocks / engine.info.limits.num_blocks if engine.stats.num_steps else 0.0


_LABELS = ["model_name", "engine"]
_GAUGES: tuple[tuple[str, str, Callable[[EngineView], float]], ...] = (
    ("vllm:num_requests_running", "Requests that run", lambda e: e.stats.num_running),
    ("vllm:num_requests_waiting", "Requests that the engine has waiting", lambda e: e.stats.num_waiting),
    ("vllm:kv_cache_usage_perc", "Share of KV blocks that requests hold", _kv_usage),
    ("diptych:engine_up", "1 while the engine takes requests", lambda e: e.state == "serving"),
)
_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("vllm:num_preemptions", "Preemptions", lambda s: s.num_preemptions),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache", lambda s: s.num_prefix_queried),
    ("vllm:prefix_cache_hits", "Prompt tokens found there", lambda s: s.num_prefix_hits),
    ("diptych:steps", "Steps of the engine", lambda s: s.num_steps),
    ("diptych:computed_tokens", "Tokens computed, prompts' and outputs'", lambda s: s.num_computed_tokens),
    ("diptych:device_seconds", "Time of steps on the device", lambda s: s.device_ns / 1e9),
)
