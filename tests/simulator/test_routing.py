"""Routers in the simulator: waits against closed forms and limits, old figures, and prefixes that are found again."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from policies import registry
from policies.contract import Replica, Route
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.constant import ConstantCost, LinearCost
from simulator.simulation import Simulation
from tests.policies.fleet import Loaded

MEAN_TOKENS = 1_000
TOKEN_NS = 1_000


def drawn(num_replicas: int, utilisation: float, count: int, seed: int = 1) -> list[Request]:
    """Poisson arrivals and exponential prompts; one output token, so that a service is one step, which takes as long as
    the prompt has tokens."""
    random = np.random.default_rng(seed)
    prompts = np.minimum(1 + random.exponential(MEAN_TOKENS, count).astype(np.int64), 50_000)
    gaps = random.exponential(1.0, count)
    gaps *= prompts.mean() * TOKEN_NS / (utilisation * num_replicas) / gaps.mean()
    arrivals = np.rint(np.cumsum(gaps)).astype(np.int64).tolist()
    return [Request(i, at, prompt, 1) for i, (at, prompt) in enumerate(zip(arrivals, prompts.tolist(), strict=True))]


def simulated(router: str, num_replicas: int, requests: list[Request]) -> list[int]:
    """When each begins to be served: the simulator."""
    limits = Limits(4_096, max_num_seqs=1, max_num_batched_tokens=60_000, max_model_len=60_000, prefix_caching=False)
    stacks = [StackSpec().build() for _ in range(num_replicas)]
    simulation = Simulation(limits, stacks, LinearCost(0, TOKEN_NS), registry.make("router", router, seed=1))
    simulation.run(Arrival(request, 1) for request in requests)
    return [request.first_scheduled_ns or 0 for request in requests]


def plain(
    router: str,
    num_replicas: int,
    requests: list[Request],
    look: Callable[[int, list[Loaded]], None] = lambda i, replicas: None,
) -> list[int]:
    """The same, as queues before servers and nothing else: the real router, and a tenth of the time. `look` is called
    with every request's number and the replicas as it finds them."""
    policy = registry.make("router", router, seed=1)
    replicas = [Loaded(i) for i in range(num_replicas)]
    free_at, starts = [0] * num_replicas, []
    ends: list[tuple[int, int, int]] = []
    for request in requests:
        while ends and ends[0][0] <= request.arrival_ns:
            end, i, target = heapq.heappop(ends)
            replicas[target].num_running -= 1  # with those that wait
            policy.on_end(requests[i], target, end)
        look(request.id, replicas)
        target = policy.route(request, [], replicas, request.arrival_ns).replica
        replicas[target].num_running += 1
        starts.append(max(request.arrival_ns, free_at[target]))
        free_at[target] = starts[-1] + request.num_prompt_tokens * TOKEN_NS
        heapq.heappush(ends, (free_at[target], request.id, target))
    return starts


def mean_wait(router: str, num_replicas: int, utilisation: float, count: int) -> float:
    """Mean wait in mean services, after a warm-up of a tenth."""
    requests = drawn(num_replicas, utilisation, count)
    waits = np.array(plain(router, num_replicas, requests)) - [request.arrival_ns for request in requests]
    return float(np.mean(waits[count // 10 :]) / (np.mean([r.num_prompt_tokens for r in requests]) * TOKEN_NS))


OLD = f"refresh_ms={2 * MEAN_TOKENS * TOKEN_NS / 1e6}"


@pytest.mark.parametrize(
    "router",
    ["random", "power_of_two", "least_requests", f"stale,router=least_requests/load=reported,{OLD}",
     f"stale,router=power_of_two/load=reported,{OLD}"],
)  # fmt: skip
def test_behind_a_router_every_request_is_served_when_it_is_in_plain_queues(router: str) -> None:
    requests = drawn(4, 0.8, 400)
    assert plain(router, 4, requests) == simulated(router, 4, requests)


def test_waits_fall_from_chance_to_two_choices_to_the_shortest_queue() -> None:
    waits = {name: mean_wait(name, 4, 0.8, 12_000) for name in ("random", "power_of_two", "least_requests")}
    assert waits["random"] == pytest.approx(4, rel=0.2)
    assert waits["least_requests"] < 0.75 * waits["power_of_two"]
    assert waits["power_of_two"] < 0.6 * waits["random"]


def test_random_routing_waits_as_long_as_in_m_m_1_queues() -> None:
    """rho / (1 - rho): a Poisson stream that is split by chance is Poisson streams."""
    assert mean_wait("random", 4, 0.5, 40_000) == pytest.approx(1, rel=0.03)


def test_two_choices_among_many_wait_as_long_and_queue_as_much_as_in_the_limit() -> None:
    """Vvedenskaya et al., Mitzenmacher: with d = 2 and n -> infinity a share of rho^(2^i - 1) of the servers has i
    requests or more, and the mean time in system is the sum over i of rho^(2^i - 2). By chance: rho^i."""
    num_replicas, count, warm = 200, 40_000, 8_000
    requests, found = drawn(num_replicas, 0.8, count), []

    def look(i: int, replicas: list[Loaded]) -> None:
        if i >= warm and i % num_replicas == 0:
            found.append([replica.num_running for replica in replicas])

    waits = np.array(plain("power_of_two", num_replicas, requests, look)) - [r.arrival_ns for r in requests]
    mean = 1 + np.mean(waits[warm:]) / (np.mean([r.num_prompt_tokens for r in requests]) * TOKEN_NS)
    assert mean == pytest.approx(sum(0.8 ** (2**i - 2) for i in range(1, 9)), rel=0.02)
    shares = [np.mean(np.array(found) >= i) for i in (1, 2, 3, 4)]
    assert shares[:3] == pytest.approx([0.8 ** (2**i - 1) for i in (1, 2, 3)], rel=0.02)
    assert shares[3] == pytest.approx(0.8**15, rel=0.1)


def test_with_old_figures_the_shortest_queue_herds_and_two_choices_do_not() -> None:
    """Figures as old as two mean services, 16 replicas, load 0.8 (Mitzenmacher 2000, section 5)."""
    two, all_of_them = "router=power_of_two/load=reported", "router=least_requests/load=reported"
    fresh = mean_wait("least_requests", 16, 0.8, 6_000)
    by_chance = mean_wait("random", 16, 0.8, 6_000)
    of_two = mean_wait(f"stale,{two},{OLD}", 16, 0.8, 6_000)
    herding = mean_wait(f"stale,{all_of_them},{OLD}", 16, 0.8, 6_000)
    counted = mean_wait(f"stale,router=least_requests,{OLD}", 16, 0.8, 6_000)
    assert fresh < of_two < 0.7 * by_chance < by_chance < 0.5 * herding
    assert counted < 0.7 * of_two  # the router's own count is never old


def cached_share(router: str) -> float:
    """Of the prompt tokens, with 24 prefixes of 32 blocks on 4 replicas that hold 10 of them each."""
    random = np.random.default_rng(5)
    limits = Limits(400, max_num_seqs=16, max_model_len=1_024)
    stacks = [StackSpec().build() for _ in range(4)]
    simulation = Simulation(limits, stacks, LinearCost(2e6, 20_000), registry.make("router", router, block_size=16))
    arrivals = []
    for i, prefix in enumerate(random.integers(0, 24, 400).tolist()):
        keys = [f"{prefix}/{k}".encode() for k in range(32)] + [f"own {i}/{k}".encode() for k in range(2)]
        arrivals.append(Arrival(Request(i, i * 5_000_000, 34 * 16, 20, session=prefix), 20, keys))
    simulation.run(arrivals)
    return sum(a.request.num_cached_tokens for a in arrivals) / (len(arrivals) * 34 * 16)


@pytest.fixture(scope="module")
def in_turn() -> float:
    return cached_share("round_robin")


@pytest.mark.parametrize(
    ("router", "at_least"),
    [
        ("prefix_affinity", 0.8),
        ("kv_aware", 0.6),
        ("lmetric", 0.6),
        ("preble", 0.6),
        ("session", 0.8),
        ("consistent_hash,key=prefix", 0.6),
    ],
)
def test_routers_that_mind_prefixes_have_more_of_them_cached(router: str, at_least: float, in_turn: float) -> None:
    assert in_turn < 0.45  # 10 of 24 fit
    assert cached_share(router) > at_least


def test_sixty_four_replicas_are_served_by_every_router() -> None:
    limits = Limits(64, max_num_seqs=4, prefix_caching=False)
    for name in registry.names("router"):
        if registry.moves_kv(registry.find("router", name)):
            continue  # it hands requests on between replicas, and needs to be told what a transfer costs
        requests = [Request(i, i * 1_000, 8, 4) for i in range(100)]
        stacks = [StackSpec().build() for _ in range(64)]
        Simulation(limits, stacks, ConstantCost(10_000), registry.make("router", name)).run(
            Arrival(request, 4) for request in requests
        )
        assert all(request.num_output_tokens == 4 for request in requests)


class Witness:
    """Takes turns, and notes what it is shown."""

    def __init__(self) -> None:
        self.keys: list[Sequence[bytes]] = []
        self.figures: list[list[tuple[int, ...]]] = []

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route:
        self.keys.append(keys)
        self.figures.append(
            [(r.num_blocks, r.num_prefill_tokens, r.num_outstanding_tokens, r.num_free_blocks) for r in replicas]
        )
        return Route(request.id % 2)

    def on_end(self, request: Request, replica: int, now: int) -> None: ...


def test_a_router_sees_the_keys_of_the_prompt_and_not_those_of_the_output_to_come() -> None:
    witness = Witness()
    simulation = Simulation(Limits(64), [StackSpec().build() for _ in "ab"], ConstantCost(1_000), witness)
    keys = [f"{k}".encode() for k in range(9)]
    simulation.run([Arrival(Request(0, 0, 40, 99), 99, keys), Arrival(Request(1, 1, 15, 99), 99, keys)])
    assert witness.keys == [keys[:2], []]


def test_a_router_sees_prompt_tokens_still_to_compute_with_and_without_decodes() -> None:
    witness, limits = Witness(), Limits(64, max_num_batched_tokens=50, prefix_caching=False)
    simulation = Simulation(limits, [StackSpec().build() for _ in "ab"], ConstantCost(1_000), witness)
    # Both go to replica 0: 100 tokens arrive at 0, of which 50 are being computed at 10; at 2,010 it decodes.
    times = [0, 0, 10, 2_010]
    prompts = [100, 1, 200, 1]
    simulation.run(Arrival(Request(i, at, p, 9), 9) for i, (at, p) in enumerate(zip(times, prompts, strict=True)))
    first = [figures[0] for figures in witness.figures]
    assert first[0] == (64, 0, 0, 64)
    assert first[1] == (64, 100, 100, 64)  # at the door
    assert first[2] == (64, 50, 50, 64 - 4)
    assert first[3][:3] == (64, 200 - 49, 200 - 49 + 1)
