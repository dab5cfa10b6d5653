"""Mean times of real policies and of theory: each policy is to the step a queue written down plainly, and long runs of
that have the means of the closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from policies import registry
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.base import CostModel
from simulator.costs.constant import ConstantCost, LinearCost
from simulator.links import LinkSpeed
from simulator.simulation import Simulation
from tests.simulator import queues
from tests.simulator.queues import mean_time

STEP_NS = 1_000_000
LONG = {0.5: 100_000, 0.8: 400_000}
"""Requests of a run with a load."""
LAWS = ("constant", "exponential", "H2")
LOADS = tuple(LONG)
CATALOGUE = {  # mean times, in mean services, with loads of 0.5 and 0.8
    ("exponential", "fcfs"): (2, 5),
    ("exponential", "sjf"): (1.712, 2.862),
    ("exponential", "srpt"): (1.425, 2.334),
    ("H2", "fcfs"): (6, 21),
    ("H2", "sjf"): (3.979, 6.882),
    ("H2", "srpt"): (1.391, 2.126),
    ("constant", "fcfs"): (1.5, 3),
    ("constant", "sjf"): (1.5, 3),
}
THEORY = {"fcfs": queues.mean_fcfs, "sjf": queues.mean_sjf, "srpt": queues.mean_srpt}


def serve(
    stack: StackSpec, outputs: list[int], arrivals: list[int], slots: int = 1, costs: CostModel | None = None
) -> list[int]:
    """When each ends, a token a step and prompts of one token; whoever is stopped goes on where it was."""
    limits = Limits(100_000, 16, slots, 8_192, 8_192, prefix_caching=False)
    requests = [
        Request(i, at, 1, 8_000, hints={"output_tokens": n})
        for i, (at, n) in enumerate(zip(arrivals, outputs, strict=True))
    ]
    simulation = Simulation(limits, [stack.build()], costs or ConstantCost(STEP_NS))
    simulation.run(Arrival(r, n) for r, n in zip(requests, outputs, strict=True))
    return [request.finish_ns or 0 for request in requests]


def some(law: str, mean: int, count: int, utilisation: float, servers: int = 1) -> tuple[list[int], list[int]]:
    """Whole sizes in steps, and arrivals at ends of steps."""
    random = np.random.default_rng(11)
    sizes = np.maximum(1, np.rint(mean * queues.sizes_of(law, count, random))).astype(np.int64)
    return sizes.tolist(), np.rint(queues.poisson(sizes, utilisation, random, servers)).astype(np.int64).tolist()


# Real policies are these queues


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(
    ("stack", "queue"),
    [
        (StackSpec(), queues.fcfs),
        (StackSpec(queue="sjf"), queues.sjf),
        (StackSpec("preemptive,mode=keep", "srpt"), queues.srpt),
        (StackSpec("preemptive,mode=keep", "las,quantum_ms=0"), queues.las),
    ],
    ids=["fcfs", "sjf", "srpt", "las"],
)
def test_served_one_at_a_time_every_request_ends_when_it_does_in_the_plain_queue(
    stack: StackSpec, queue: Callable[[list[int], list[int]], list[int]], law: str
) -> None:
    sizes, arrivals = some(law, 6, 150, 0.8)
    ends = serve(stack, sizes, [at * STEP_NS for at in arrivals])
    assert ends == [end * STEP_NS for end in queue(sizes, arrivals)]


@pytest.mark.parametrize("slots", [4, 16])
def test_a_batch_with_steps_of_one_length_is_a_queue_with_as_many_servers(slots: int) -> None:
    sizes, arrivals = some("exponential", 10, 300, 0.9, slots)
    ends = serve(StackSpec(), sizes, [at * STEP_NS for at in arrivals], slots)
    assert ends == [end * STEP_NS for end in queues.fcfs(sizes, arrivals, slots)]


@pytest.mark.parametrize(("law", "load"), [("constant", 0.5), ("exponential", 0.8), ("H2", 0.8)])
def test_a_batch_whose_steps_take_as_long_as_they_have_tokens_shares_its_time_among_all(law: str, load: float) -> None:
    """But for what is rounded to whole tokens, 2 % of the mean time at most."""
    sizes, arrivals = some(law, 30_000, 300, load)
    tokens = [-(-size // 1_000) for size in sizes]
    ends = serve(StackSpec(), tokens, arrivals, 2_000, LinearCost(0, 1_000))
    expected = mean_time(queues.processor_sharing([1_000 * n for n in tokens], arrivals), arrivals, sizes)
    assert mean_time(ends, arrivals, sizes) == pytest.approx(expected, rel=0.02)


def test_a_prefill_and_a_decode_replica_without_a_way_between_them_are_two_queues_in_tandem() -> None:
    """Each serves one at a time, and a token in a unit of time; the prefill gives the first token."""
    random, count = np.random.default_rng(3), 150
    prompts, outputs = random.integers(1, 40, count).tolist(), random.integers(2, 40, count).tolist()
    arrivals = np.cumsum(random.integers(0, 60, count)).tolist()
    limits = Limits(4_000, 4, 1, 1_000, 200, prefix_caching=False)
    stacks = [StackSpec().build(block_size=4) for _ in range(2)]
    router = registry.make("router", "disaggregated", block_size=4)
    simulation = Simulation(limits, stacks, LinearCost(0, 1), router, link=LinkSpeed(math.inf, 1))
    requests = [Request(i, at, n, outputs[i]) for i, (at, n) in enumerate(zip(arrivals, prompts, strict=True))]
    simulation.run(Arrival(request, request.max_tokens) for request in requests)
    first = queues.fcfs(prompts, arrivals)
    assert [request.first_token_ns for request in requests] == first
    assert [request.finish_ns for request in requests] == queues.fcfs([n - 1 for n in outputs], first)


# These queues have the means that theory says


@pytest.mark.parametrize(("law", "queue"), CATALOGUE)
def test_closed_forms_give_the_known_figures(law: str, queue: str) -> None:
    """Oracles B1 and B2. Those of the catalogue were measured on 400,000 requests."""
    if law == "constant":
        assert [queues.mean_fcfs(np.ones(9), load) for load in LOADS] == pytest.approx(CATALOGUE[law, queue])
        return
    sizes = queues.sizes_of(law, 400_000, np.random.default_rng(4))
    assert [THEORY[queue](sizes, load) for load in LOADS] == pytest.approx(CATALOGUE[law, queue], rel=0.02)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("law", ["exponential", "H2"])
def test_long_runs_have_the_means_of_the_closed_forms(law: str, load: float) -> None:
    """Oracles B1, B2 and of B3 that of sharing, which is the same for every law: within 2 %."""
    random = np.random.default_rng(2)
    sizes = queues.sizes_of(law, LONG[load], random)
    arrivals = queues.poisson(sizes, load, random)
    means = {
        queue.__name__: mean_time(queue(sizes.tolist(), arrivals.tolist()), arrivals, sizes)
        for queue in (queues.fcfs, queues.sjf, queues.srpt, queues.processor_sharing)
    }
    theory = {name: mean(sizes, load) for name, mean in THEORY.items()}
    theory["processor_sharing"] = queues.mean_sharing(load)
    assert means == pytest.approx(theory, rel=0.02)


@pytest.mark.parametrize("load", LOADS)
def test_of_constant_services_every_order_ends_at_the_same_times_and_sharing_is_worse(load: float) -> None:
    """The mean of the orders is that of M/D/1 (`test_queueing`)."""
    random, sizes = np.random.default_rng(2), np.ones(LONG[load] // 4)
    arrivals = queues.poisson(sizes, load, random).tolist()
    first, shortest, least, sharing = (
        queue(sizes.tolist(), arrivals) for queue in (queues.fcfs, queues.sjf, queues.srpt, queues.processor_sharing)
    )
    assert first == shortest == pytest.approx(least)
    ratio = mean_time(sharing, arrivals, sizes) / mean_time(first, arrivals, sizes)
    assert ratio == pytest.approx(queues.mean_sharing(load) / queues.mean_fcfs(sizes, load), rel=0.02)


@pytest.mark.parametrize("load", LOADS)
def test_who_does_not_look_at_sizes_has_the_mean_of_first_come_first_served_if_sizes_have_no_memory(
    load: float,
) -> None:
    """Oracle B3: geometric sizes, arrivals at ends of steps."""
    random = np.random.default_rng(2)
    sizes = random.geometric(1 / 2, LONG[load] // 2)
    arrivals = np.ceil(queues.poisson(sizes, load, random)).astype(np.int64).tolist()
    means = [mean_time(queue(sizes.tolist(), arrivals), arrivals, sizes) for queue in (queues.las, queues.fcfs)]
    assert means[0] == pytest.approx(means[1], rel=0.02)


@pytest.mark.parametrize(("servers", "load"), [(4, 0.5), (4, 0.8), (16, 0.8)])
def test_several_servers_have_the_mean_of_erlangs_c(servers: int, load: float) -> None:
    """Oracle B3, as the mean wait over that of one server as fast as all together, for the same requests."""
    random = np.random.default_rng(2)
    sizes = queues.sizes_of("exponential", 400_000, random)
    arrivals = queues.poisson(sizes, load, random, servers).tolist()
    several = mean_time(queues.fcfs(sizes.tolist(), arrivals, servers), arrivals, sizes) - 1
    one = mean_time(queues.fcfs((sizes / servers).tolist(), arrivals), arrivals, sizes) - 1 / servers
    expected = (queues.mean_of_servers(servers, load) - 1) / (load / (1 - load) / servers)
    assert several / one == pytest.approx(expected, rel=0.02)


def test_two_queues_in_tandem_have_the_mean_of_two_queues_by_themselves() -> None:
    """Burke, Jackson: what leaves a queue of exponential services is a Poisson stream, so the times add up."""
    random, count = np.random.default_rng(6), 1_000_000
    first, second = (queues.sizes_of("exponential", count, random) * mean for mean in (0.5, 0.7))
    ends = at = np.cumsum(random.exponential(1, count))
    for sizes in (first, second):
        before = np.cumsum(sizes) - sizes
        ends = np.maximum.accumulate(ends - before) + before + sizes  # Lindley
    assert float(np.mean(ends - at)) == pytest.approx(0.5 / (1 - 0.5) + 0.7 / (1 - 0.7), rel=0.02)
