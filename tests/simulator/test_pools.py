"""Routers with a pool for prefills and one for decodes, in the simulator: against queueing theory, by hand, and as
published."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from policies.replica_state import Limits
from policies.request import Request, State
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.constant import ConstantCost, LinearCost
from simulator.links import LinkSpeed
from simulator.simulation import Simulation
from tests.policies.fleet import make_router
from tests.simulator.test_queueing import STEP_NS, lindley, poisson
from tests.simulator.test_transfers import AT_ONCE, happened, simulate

ROUTERS = ("disaggregated", "splitwise,max_pending_tokens=1000000", "distserve", "mooncake")


def tandem(arrivals: np.ndarray, first_steps: int, second_steps: int) -> np.ndarray:
    """When each is through two servers one after the other, in ns: Lindley's recursion for the one, then the other."""
    ones = np.ones(len(arrivals), np.int64)
    between = lindley(ones * first_steps, arrivals) + first_steps * STEP_NS
    return lindley(ones * second_steps, between) + second_steps * STEP_NS


@pytest.mark.parametrize(("decode_steps", "utilisation"), [(1, 0.8), (2, 0.6), (2, 0.9)])
def test_one_prefill_and_one_decode_replica_with_an_infinite_link_are_two_servers_one_after_the_other(
    decode_steps: int, utilisation: float
) -> None:
    """Each serves one at a time: a prefill takes a step, a decode so many. In the mean a request waits for both
    together as long as it would in M/D/1 for the slower one (Friedman 1965)."""
    slower = max(1, decode_steps)
    arrivals = poisson(np.full(1_000_000, slower), utilisation, seed=7)
    through = tandem(arrivals, 1, decode_steps)
    mean = float(np.mean((through - arrivals)[len(arrivals) // 10 :])) / STEP_NS
    waits = slower * utilisation / (2 * (1 - utilisation))
    assert mean == pytest.approx(1 + decode_steps + waits, rel=0.02)
    for name in ROUTERS:
        router = make_router(name, cost=ConstantCost(STEP_NS), transfer=AT_ONCE)
        jobs = [(at, 1, 1 + decode_steps) for at in arrivals[:150].tolist()]
        requests, _, _ = simulate(
            router, jobs, costs=ConstantCost(STEP_NS), check=False, num_blocks=4_096, max_num_seqs=1
        )
        assert [r.finish_ns for r in requests] == through[:150].tolist(), name
        assert [r.first_token_ns for r in requests] == (lindley(np.ones(150, int), arrivals[:150]) + STEP_NS).tolist()


def test_distserve_keeps_finished_prefills_at_their_replica_until_one_of_the_others_has_room() -> None:
    """Blocks of 4, 8 a replica. Each request has 16 tokens and needs 5 blocks with its next; prefills are one at a
    time, a step each, decodes three steps. The first decodes at 1 from 1,000 on, the second at 2, which has fewer
    blocks in use, from 2,000 on. The third is done at 3,000, and pulled by 1 at 4,000; the fourth at 4,000, and by 2 at
    5,000."""
    router = make_router("distserve,waiting=1", block_size=4)
    requests, log, _ = simulate(router, [(i, 16, 4) for i in range(4)], replicas=3, num_blocks=8, max_num_seqs=1)
    assert [r.first_token_ns for r in requests] == [1_000, 2_000, 3_000, 4_000]
    assert [r.finish_ns for r in requests] == [4_000, 5_000, 7_000, 8_000]
    assert [happened(log, i)[1][:2] for i in range(4)] == [(k, "reserve") for k in (1, 2, 1, 2)]


def test_splitwise_lends_a_token_machine_while_prompts_queue_and_takes_it_back() -> None:
    """One prompt machine and two token machines, prompts of 8 tokens, one at a time; more than 15 tokens are too many.
    The second would make it 16 at 0, so 2 is lent, which has less pending than 1, where the first is to decode. The
    third would make it 17 at 2 (8 + 8, and a decode), so 1 is lent too. They decode where they are, and 1 then has no
    slot for the first until 3,000. At 6,000 all are home."""
    router = make_router("splitwise,max_pending_tokens=15", block_size=4)
    requests, log, _ = simulate(router, [(0, 8, 3), (0, 8, 3), (0, 8, 3), (6_000, 8, 3)], replicas=3, max_num_seqs=1)
    assert [r.first_token_ns for r in requests] == [1_000, 1_000, 1_000, 7_000]
    assert [r.finish_ns for r in requests] == [5_000, 3_000, 3_000, 9_000]
    assert [[d[:2] for d in happened(log, i)[1:2]] for i in range(4)] == [[(1, "reserve")], [], [], [(1, "reserve")]]


# Mooncake

COST = LinearCost(50_000, 1_000)


def conductor_by_hand(arrivals: Sequence[int], prompts: Sequence[int], ttft_ns: int) -> list[int | None]:
    """Time to first token of each with two prefill servers that take one at a time; None: refused."""
    free_at, answers = [0, 0], []
    for now, tokens in zip(arrivals, prompts, strict=True):
        takes = 50_000 + 1_000 * tokens
        ttft, server = min((max(0, free_at[s] - now) + takes, s) for s in (0, 1))
        if ttft <= ttft_ns:
            free_at[server] = now + ttft
        answers.append(ttft if ttft <= ttft_ns else None)
    return answers


@pytest.mark.parametrize("ttft_ns", [300_000, 700_000, 10**12])
def test_the_predicted_time_to_first_token_comes_true_and_exactly_those_are_refused_that_would_miss_theirs(
    ttft_ns: int,
) -> None:
    """Prefills one at a time, first come, first served, without prefixes: then nothing in the prediction is a guess."""
    random, count = np.random.default_rng(3), 300
    arrivals = np.cumsum(random.integers(0, 130_000, count)).tolist()
    prompts = random.integers(1, 300, count).tolist()
    router = make_router(f"mooncake,prefill=2,ttft_ms={ttft_ns / 1e6}", block_size=4, cost=COST, transfer=AT_ONCE)
    jobs = list(zip(arrivals, prompts, [2] * count, strict=True))
    requests, _, _ = simulate(router, jobs, costs=COST, replicas=3, check=False, num_blocks=10_000, max_num_seqs=1)
    expected = conductor_by_hand(arrivals, prompts, ttft_ns)
    assert 0 < expected.count(None) < count or ttft_ns == 10**12
    got = [None if r.first_token_ns is None else r.first_token_ns - r.arrival_ns for r in requests]
    assert got == expected
    assert all((r.state is State.REFUSED) == (ttft is None) for r, ttft in zip(requests, expected, strict=True))


def test_what_many_ask_for_is_fetched_and_from_then_on_cached_in_several_places() -> None:
    """A prompt of 64 tokens takes 114,000 ns; with 15 of its 16 blocks cached 54,000, and they take 150 to fetch. The
    first leaves them at replica 0. Of five that come together later three go there, and two to 1, for which they are
    fetched: for both, as they are on their way only when the second is routed."""
    keys = [[f"hot{k}".encode() for k in range(15)] + [f"own{i}".encode()] for i in range(6)]
    link = LinkSpeed(1e9, 10)
    router = make_router("mooncake,prefill=2", block_size=4, cost=COST, transfer=link)
    jobs = [(0, 64, 2)] + [(1_000_000, 64, 2)] * 5
    requests, log, simulation = simulate(router, jobs, link, COST, 3, keys, num_blocks=200, max_num_seqs=1)
    assert requests[0].num_cached_tokens == 0
    assert [r.num_cached_tokens for r in requests[1:]] == [60] * 5
    fetched = [i for i in range(6) if (1, "borrow", 15) in happened(log, i)]
    assert fetched == [2, 4]
    assert [replica.match(keys[0][:15]) for replica in simulation.replicas] == [15, 15, 15]


def num_good(reject: str, seed: int) -> int:
    """How many of 300 requests keep a decode step of 6 ms on average, with two replicas for each phase. A step takes
    5 ms and 0.2 ms a token, so 5 decodes at once are as many as do. Each decodes for 300 ms, give or take a fifth."""
    random, costs = np.random.default_rng(seed), LinearCost(5e6, 200_000)
    knobs = f"mooncake,prefill=2,reject={reject},ttft_ms=2000,tbt_ms=6,decode_ms=300"
    limits = Limits(2_000, max_num_seqs=64, prefix_caching=False)
    simulation = Simulation(
        limits,
        [StackSpec().build() for _ in range(4)],
        costs,
        make_router(knobs, cost=costs, transfer=AT_ONCE),
        link=AT_ONCE,
    )
    arrivals = np.cumsum(random.exponential(1e9 / 40, 300)).astype(int).tolist()
    prompts, outputs = random.integers(200, 400, 300).tolist(), random.integers(40, 61, 300).tolist()
    requests = [Request(i, at, prompt, 200) for i, (at, prompt) in enumerate(zip(arrivals, prompts, strict=True))]
    simulation.run(Arrival(request, output) for request, output in zip(requests, outputs, strict=True))
    served = [r for r in requests if r.state is not State.REFUSED]
    steps = [(r.finish_ns - r.first_token_ns) / (r.num_output_tokens - 1) for r in served]  # type: ignore[operator]
    return sum(step <= 6e6 for step in steps)


def test_refusing_by_the_decodes_to_come_keeps_more_objectives_than_by_those_of_now_and_that_more_than_never() -> None:
    """Mooncake's report, section 7: those on their way from the prefills are not seen yet where they are to decode."""
    never, now, predicted = (num_good(reject, seed=0) for reject in ("never", "now", "predicted"))
    assert predicted > 1.1 * now > 1.1 * 1.5 * never
