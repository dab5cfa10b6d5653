"""The same sessions through four routers of prefill and decode replicas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from policies.random_stream import RandomStream
from policies.replica_state import Limits
from policies.request import Request
from policies.routers.mooncake import Mooncake, Plan
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.constant import LinearCost
from simulator.links import LinkSpeed
from simulator.simulation import Simulation


class AtRandom(Mooncake):
    """Any prefill replica."""

    def _choose(self, plans: Sequence[Plan]) -> Plan:
        self.drawn = getattr(self, "drawn", 0) + 1
        return plans[int(RandomStream(1, "at_random").uniform(self.drawn) * len(plans))]


class ShortestQueue(Mooncake):
    """The prefill replica with the least to do, whatever it has cached."""

    def _choose(self, plans: Sequence[Plan]) -> Plan:
        return min(plans, key=lambda plan: (plan.ttft_ns - plan.prefill_ns, plan.replica))


def sessions(count: int, seed: int) -> list[Arrival]:
    """Conversations whose prompts grow from turn to turn by what was said, some of them begun far more often; 1.5 begin
    in a second."""
    random, made = np.random.default_rng(seed), []
    for session in range(count):
        at, topic, tokens = int(random.uniform(0, count / 1.5 * 1e9)), min(int(random.zipf(1.6)), 40), 0
        for _ in range(int(random.integers(1, 7))):
            tokens += int(random.integers(1_000, 5_000))
            keys = [f"topic{topic}/{k}" if k < 8 else f"{session}/{k}" for k in range(tokens // 256)]
            made.append((at, tokens, session, [key.encode() for key in keys]))
            at += int(random.exponential(12e9))
    made.sort(key=lambda one: one[0])
    return [Arrival(Request(i, at, tokens, 4, session=s), 4, keys) for i, (at, tokens, s, keys) in enumerate(made)]


def by_router(count: int, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Mean time to first token in seconds, and the share of prompt tokens that were cached, by router.

    Four replicas prefill, two decode. A step takes 1 ms and 0.1 ms a token; KV goes at 10 GB/s, 128 KiB a token.
    """
    costs, link = LinearCost(1e6, 100_000), LinkSpeed(10e9, 256 * 131_072)

    def router(kind: type[Mooncake], **knobs: None) -> Mooncake:
        return kind(costs, link, prefill=4, reject="never", block_size=256, **knobs)  # type: ignore[arg-type]

    made = {
        "chance": router(AtRandom, threshold=None),
        "queue": router(ShortestQueue, threshold=None),
        "caches": router(Mooncake, threshold=None),
        "conductor": router(Mooncake),
    }
    found = {name: _mean_ttft(each, sessions(count, seed), costs, link) for name, each in made.items()}
    return {name: ttft for name, (ttft, _) in found.items()}, {name: share for name, (_, share) in found.items()}


def _mean_ttft(
    router: Mooncake, arrivals: Sequence[Arrival], costs: LinearCost, link: LinkSpeed
) -> tuple[float, float]:
    limits = Limits(2_000, 256, max_num_seqs=64, max_num_batched_tokens=32_768, max_model_len=65_536)
    simulation = Simulation(limits, [StackSpec().build(block_size=256) for _ in range(6)], costs, router, link=link)
    simulation.run(arrivals)
    requests = [arrival.request for arrival in arrivals]
    cached = sum(r.num_cached_tokens for r in requests) / sum(r.num_prompt_tokens for r in requests)
    waits = [r.first_token_ns - r.arrival_ns for r in requests if r.first_token_ns is not None]
    return float(np.mean(waits)) / 1e9, cached
