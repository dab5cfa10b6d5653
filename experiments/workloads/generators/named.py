"""Named workloads without data. Each is one kind of service: its arrivals and its lengths.

| name | lengths | arrivals (req/s of its own) |
| --- | --- | --- |
| `chat` | Azure 2023 conversation | MMPP of 3 states fitted to it (5.5) |
| `code` | Azure 2023 code | MMPP of 4 states fitted to it (2.5): strongly on and off |
| `sharegpt` | ShareGPT, 8k tokens at most: turns with their history | Poisson (5) |
| `multi-tenant` | VTC's Chatbot Arena log | Gamma, CV 1.10, and that log's 27 client shares (2.5) |
| `reasoning` | ServeGen deepseek-r1 | 73 bursty clients of very different rates (13.4) |
| `prefix-chat` | Mooncake conversation, with prefix blocks | Poisson sessions with turns (3.4) |
| `sessions` | Azure 2023 conversation, growing by turns | Poisson sessions, turns after think times (2) |
| `agents` | mini-swe-agent's, growing by tools' answers | Poisson programs, calls after tools and each other (2) |
| `fixed` | constant | Poisson at a given rate, or all at once |
| `uniform` | uniform in a range | Poisson at a given rate, or all at once |
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np

from experiments.workloads.generators import arrivals
from experiments.workloads.generators.lengths import TABLES, Constant, Lengths
from experiments.workloads.generators.processes import Process, Size, draw_times
from experiments.workloads.generators.streams import stream
from experiments.workloads.request import Workload

VTC_RATE, VTC_CV = 2.498, 1.10
REASONING_RATE = 13.41
SHAREGPT_RATE = 5.0
"""No trace has its arrivals."""

#: Requests of each of the 27 clients in the Arena log of VTC (OSDI 2024): 1,500 in all.
VTC_CLIENT_REQUESTS = (
    *(296, 262, 199, 120, 67, 66, 56, 46, 44, 43, 40, 36, 31, 26, 25, 23, 22, 22, 19, 19, 12, 11, 7, 3),
    *(2, 2, 1),
)


def draw(name: str, times: arrivals.Seconds, lengths: tuple[Lengths, Lengths], seed: int) -> Workload:
    """Requests at `times` (seconds) with prompt and output lengths drawn independently."""
    prompt, output = lengths
    return Workload.build(
        arrivals.to_ns(times),
        prompt.draw(len(times), stream(seed, "prompt tokens")),
        output.draw(len(times), stream(seed, "output tokens")),
        name=name,
    )


def chat(size: Size, process: Process = "mmpp-conv", cv: float | None = None) -> Workload:
    """Azure 2023 conversation service: input p50 1,020, output p50 129 and bimodal."""
    return draw("chat", draw_times(process, _at(size, 5.53), cv), TABLES["azure_conv"], size.seed)


def code(size: Size, process: Process = "mmpp-code", cv: float | None = None) -> Workload:
    """Azure 2023 code completion: input p50 1,469, output p50 13."""
    return draw("code", draw_times(process, _at(size, 2.49), cv), TABLES["azure_code"], size.seed)


def sharegpt(size: Size, process: Process = "poisson", cv: float | None = None) -> Workload:
    """ShareGPT's conversations, a turn with all before it: input p50 1,730, output p50 415."""
    return draw("sharegpt", draw_times(process, _at(size, SHAREGPT_RATE), cv), TABLES["sharegpt_8k"], size.seed)


def multi_tenant(size: Size, process: Process = "gamma", cv: float | None = None) -> Workload:
    """Chatbot Arena clients of VTC: the top one sends 19.7 % of the requests, the top four 58.5 %."""
    times = draw_times(process, _at(size, VTC_RATE), VTC_CV if cv is None else cv)
    shares = {f"client-{k}": float(count) for k, count in enumerate(VTC_CLIENT_REQUESTS)}
    return assign_tenants(draw("multi-tenant", times, TABLES["vtc_arena"], size.seed), shares, size.seed)


def reasoning(size: Size, process: Process | None = None, cv: float | None = None) -> Workload:
    """deepseek-r1 lengths (output mean 1.5 k, p99 12.5 k) from 73 clients in ServeGen's manner.

    With a named `process` the clients only give names; arrivals are of that process.
    """
    rate = REASONING_RATE if size.rate is None else size.rate
    population = arrivals.Clients()
    if process is not None:
        times = draw_times(process, _at(size, rate), cv)
        shares = {f"client-{k}": float((k + 1) ** -population.rank_slope) for k in range(population.count)}
        return assign_tenants(draw("reasoning", times, TABLES["deepseek_r1"], size.seed), shares, size.seed)
    times, horizon = arrivals.until(
        lambda horizon: population.arrivals(horizon, rate, size.seed)[0], rate, size.n, size.duration_s
    )
    clients = population.arrivals(horizon, rate, size.seed)[1][: len(times)]
    drawn = draw("reasoning", times - times[0], TABLES["deepseek_r1"], size.seed)
    return drawn.replace(tenant=[f"client-{k}" for k in clients.tolist()])


def fixed(size: Size, prompt: int, output: int, process: Process | None = None, cv: float | None = None) -> Workload:
    """Every request the same."""
    times = draw_times(process or _poisson_or_at_once(size), size, cv)
    return draw("fixed", times, (Constant(prompt), Constant(output)), size.seed)


def uniform(size: Size, low: int, high: int, process: Process | None = None, cv: float | None = None) -> Workload:
    """Input and output uniform in low..high, from `random.Random(seed)`: input, then output, of each request.

    With 256 requests, 100..1024 and seed 0, all at once, it is a common offline throughput job.
    """
    times = draw_times(process or _poisson_or_at_once(size), size, cv)
    rng = random.Random(size.seed)
    pairs = np.array([(rng.randint(low, high), rng.randint(low, high)) for _ in range(len(times))])
    return Workload.build(arrivals.to_ns(times), pairs[:, 0], pairs[:, 1], name="uniform")


def assign_tenants(workload: Workload, shares: Mapping[str, float], seed: int) -> Workload:
    """Give each request a tenant, drawn with the given weights."""
    names = list(shares)
    weights = np.array([shares[name] for name in names], np.float64)
    chosen = stream(seed, "tenants").choice(len(names), len(workload), p=weights / weights.sum())
    return workload.replace(tenant=[names[k] for k in chosen.tolist()])


def _at(size: Size, rate: float) -> Size:
    """`size` with a rate: its own, or that of the workload."""
    return size if size.rate is not None else Size(size.n, size.duration_s, rate, size.seed)


def _poisson_or_at_once(size: Size) -> Process:
    return "at-once" if size.rate is None else "poisson"
