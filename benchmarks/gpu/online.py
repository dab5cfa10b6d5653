"""The online work: requests arrive one by one, and each one's latencies count."""

from __future__ import annotations

import threading
import time

import numpy as np

from benchmarks.gpu.engines import MIXED, Bench
from benchmarks.gpu.lengths import poisson_ns
from benchmarks.gpu.reference import PERCENTILES
from benchmarks.gpu.works import Details, Figures, Sizes
from runtime.sequence import Output

LATE_FACTOR = 4  # a rate is given up after so many times the span of its arrivals, and a minute


class Listener:
    """Stamps the outputs of one request. Runs on the engine's thread, so it does no more than that."""

    __slots__ = ("_ended", "count", "error", "first_ns", "last_ns")

    def __init__(self, ended: threading.Semaphore) -> None:
        self._ended = ended
        self.count = self.first_ns = self.last_ns = 0
        self.error: str | None = None

    def __call__(self, output: Output) -> None:
        if output.token_ids:
            self.last_ns = time.monotonic_ns()
            self.count += 1
            if self.count == 1:
                self.first_ns = self.last_ns
        if output.finish_reason is not None:
            self.error = output.error
            self._ended.release()


class Feeder(threading.Thread):
    """Hands in every request at its time."""

    def __init__(
        self, bench: Bench, arrivals: list[int], prompts: list[list[int]], outputs: list[int], listeners: list[Listener]
    ) -> None:
        super().__init__(name="feeder", daemon=True)
        self._bench = bench
        self._requests = list(zip(arrivals, prompts, outputs, listeners, strict=True))
        self.start_ns = time.monotonic_ns() + 50_000_000
        self.latest_ns = 0  # how far behind its time a request was handed in, at worst
        self.error: BaseException | None = None
        self.stop = threading.Event()

    def run(self) -> None:
        try:
            for arrival, prompt, output, listener in self._requests:
                due = self.start_ns + arrival
                if self.stop.wait(max(0, due - time.monotonic_ns()) / 1e9):
                    return
                self.latest_ns = max(self.latest_ns, time.monotonic_ns() - due)
                self._bench.submit(prompt, output, listener)
        except BaseException as error:
            self.error = error


def online(bench: Bench, sizes: Sizes, found: Figures, lengths: list[tuple[int, int]]) -> Details:
    """Every rate in turn."""
    bench.engine(MIXED)
    details: Details = {}
    for rate, count in sizes.online:
        table, more = measure(bench, rate, lengths[:count])
        found.update({f"online{rate}_{name}": value for name, value in table.items()})
        details[str(rate)] = more
        shown = ", ".join(f"{name} {value:,.1f}" for name, value in table.items() if "p50" in name or "tok" in name)
        print(f"  {rate}/s: {shown}", flush=True)
    return {"rates": details}


def measure(bench: Bench, rate: float, lengths: list[tuple[int, int]]) -> tuple[Figures, Details]:
    """TTFT (from the scheduled arrival), TPOT and E2E in ms, and output tokens/s, at one rate.

    TPOT is (E2E - TTFT) / (output tokens - 1), of requests with two or more.
    """
    arrivals = poisson_ns(rate, len(lengths))
    ended = threading.Semaphore(0)
    listeners = [Listener(ended) for _ in lengths]
    outputs = [output for _, output in lengths]
    feeder = Feeder(bench, arrivals, bench.prompts([prompt for prompt, _ in lengths]), outputs, listeners)
    feeder.start()
    give_up_at = time.monotonic() + 60 + LATE_FACTOR * arrivals[-1] / 1e9
    try:
        for _ in listeners:
            while not ended.acquire(timeout=1):
                if feeder.error is not None:
                    raise RuntimeError("a request could not be handed in") from feeder.error
                if time.monotonic() > give_up_at:
                    raise TimeoutError(f"requests at {rate}/s have not ended in time")
    finally:
        feeder.stop.set()
    failed = [listener.error for listener in listeners if listener.error is not None]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed, the first with: {failed[0]}")
    first, last, count = (
        np.array([getattr(one, name) for one in listeners]) for name in ("first_ns", "last_ns", "count")
    )
    due = np.array(arrivals) + feeder.start_ns
    several = count > 1
    tables = {
        "ttft": (first - due) / 1e6,
        "tpot": ((last - first)[several] / (count[several] - 1)) / 1e6,
        "e2e": (last - due) / 1e6,
    }
    found = {
        f"{name}_p{percent}_ms": float(np.percentile(values, percent))
        for name, values in tables.items()
        if len(values)
        for percent in PERCENTILES
    }
    span_s = (int(last.max()) - feeder.start_ns) / 1e9
    found["out_tok_s"] = float(count.sum()) / span_s
    return found, {"requests": len(lengths), "span_s": span_s, "latest_submit_ms": feeder.latest_ns / 1e6}
