"""Autoscalers: the HPA's formula worked by hand, its window on the way down, and attainment of first tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import registry
from policies.autoscaling import Stabilised
from policies.registry import PolicyError
from policies.request import Request, Slo, State
from tests.policies.fleet import Loaded

S = 1_000_000_000


def make(text: str):
    return registry.make("autoscaler", text)


def fleet(*loads: int) -> list[Loaded]:
    """Half of each load waits."""
    return [Loaded(i, num_waiting=load // 2, num_running=load - load // 2) for i, load in enumerate(loads)]


@pytest.mark.parametrize(
    ("loads", "starting", "size"),
    [
        ((30, 30, 30), 0, 5),  # ceil(3 * 30 / 20)
        ((22, 22, 22), 0, 3),  # 10% above: within tolerance
        ((23, 22, 22), 0, 4),
        ((60,), 2, 3),  # what starts counts as empty, so that it is not asked for twice
        ((60,), 1, 3),
        ((90, 90, 90, 90), 0, 9),  # 18, and most
        ((0, 0), 0, 2),  # least
    ],
)
def test_the_size_is_the_one_with_the_target_load(loads: tuple[int, ...], starting: int, size: int) -> None:
    scaler = make("target_load,target=20,least=2,most=9,window_s=0")
    assert scaler.every_ns == 15 * S
    assert scaler.scale(fleet(*loads), starting, 0) == size


def test_a_pool_shrinks_only_by_what_nothing_has_wanted_for_the_window() -> None:
    scaler = make("target_load,target=10,window_s=60")
    wanted = [scaler.scale(fleet(*loads), 0, at * S) for at, loads in
              [(0, [10] * 6), (15, [5] * 6), (30, [7] * 6), (60, [5] * 6), (75, [5] * 6), (105, [5] * 5)]]  # fmt: skip
    assert wanted == [6, 6, 6, 6, 5, 3]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=40), st.integers(0, 60))
def test_the_highest_recommendation_of_a_window_is_that_of_a_search_through_all(made: list, window: int) -> None:
    fast, now, slow = Stabilised(window), 0, []
    for gap, size in made:
        now += gap
        slow.append((now, size))
        assert fast.of(size, now) == max(size for at, size in slow if at >= now - window)


def ended(id: int, ttft_s: float | None, slo_s: float | None = None, state: State = State.STOPPED) -> Request:
    request = Request(id, 5 * S, 9, 9, slo=None if slo_s is None else Slo(ttft_ns=round(slo_s * S)))
    request.first_token_ns = None if ttft_s is None else 5 * S + round(ttft_s * S)
    request.state = state
    return request


def test_a_pool_that_is_late_grows_by_a_half_and_not_while_anything_starts() -> None:
    scaler = make("slo,ttft_ms=1000,target=0.9,most=7")
    replicas = fleet(0, 0, 0)
    assert scaler.scale(replicas, 0, 0) == 3  # nothing measured
    for i in range(8):
        scaler.on_end(ended(i, 0.9), 0, 10 * S)
    scaler.on_end(ended(8, 1.1), 0, 10 * S)
    scaler.on_end(ended(9, None, state=State.REFUSED), 0, 10 * S)  # counts for nothing
    assert scaler.scale(replicas, 0, 15 * S) == 5  # 8 of 9 are below 0.9
    assert scaler.scale(replicas, 2, 30 * S) == 5
    assert scaler.scale(fleet(*[0] * 5), 0, 45 * S) == 5  # measured anew
    scaler.on_end(ended(10, None, state=State.CANCELLED), 0, 50 * S)
    assert scaler.scale(fleet(*[0] * 5), 0, 60 * S) == 7  # 8, and most


def test_a_request_with_an_objective_of_its_own_is_held_to_that() -> None:
    for slo_s, size in ((2.0, 2), (0.4, 3)):
        scaler = make("slo,ttft_ms=1000")
        scaler.scale(fleet(0, 0), 0, 0)
        scaler.on_end(ended(0, 0.5 if slo_s < 1 else 1.5, slo_s), 0, S)
        assert scaler.scale(fleet(0, 0), 0, 15 * S) == size


def test_a_pool_that_has_been_in_time_for_long_shrinks_by_one_and_what_is_old_is_forgotten() -> None:
    scaler = make("slo,cooldown_s=40,window_s=30")
    sizes = [scaler.scale(fleet(0, 0, 0), 0, 0)]
    for k in range(8):
        scaler.on_end(ended(k, 3.0 if k == 0 else 0.1), 0, 15 * k * S)
        sizes.append(scaler.scale(fleet(0, 0, 0), 0, 15 * k * S + 1))
    # Late at 0 s, which is out of the window at 30 s; in time from then on, and 40 s later one fewer.
    assert sizes == [3, 5, 5, 3, 3, 3, 2, 2, 2]


@pytest.mark.parametrize(
    "text",
    ["target_load,target=0", "target_load,least=0", "target_load,least=5,most=4", "target_load,every_s=0",
     "slo,target=0.99,high=0.9", "slo,step=0", "slo,ttft_ms=0"],
)  # fmt: skip
def test_knobs_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(PolicyError, match="must be"):
        make(text)


def test_fixed_asks_for_nothing() -> None:
    scaler = make("fixed")
    assert scaler.every_ns == 0
    assert scaler.scale(fleet(1, 2), 1, 0) == 3
