"""Links: processor sharing against closed forms and against a slow reference."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.links import NS, Link, LinkSpeed
from simulator.network import Network


def ends(bandwidth: float, starts: list[tuple[int, int]]) -> dict[int, int]:
    """When each of (at, bytes) ends, by its place; `starts` in order of time."""
    link, done = Link(bandwidth), {}

    def until(now: int | None) -> None:
        while (at := link.next_end()) is not None and (now is None or at <= now):
            done.update(dict.fromkeys(link.ended(at), at))

    for number, (at, num_bytes) in enumerate(starts):
        until(at)
        link.ended(at)
        link.start(number, num_bytes, at)
    until(None)
    return done


def test_a_transfer_alone_takes_its_bytes_over_the_bandwidth_rounded_up() -> None:
    assert ends(10, [(5, 1)]) == {0: 5 + NS // 10}
    assert ends(3, [(0, 1)]) == {0: 333_333_334}
    assert ends(math.inf, [(7, 10**15)]) == {0: 7}


def test_equal_transfers_that_start_together_end_together_after_so_many_times_as_long() -> None:
    assert ends(NS, [(0, 100)] * 5) == dict.fromkeys(range(5), 500)


def test_transfers_that_overlap_share_the_link_for_as_long_as_they_do() -> None:
    """A byte a nanosecond. 100 bytes at 0; 100 at 50: from then on half the rate each. The first has 50 left and ends
    at 150, by when the second has 50 left, which it sends alone: 200. A third at 300 finds the link idle."""
    assert ends(NS, [(0, 100), (50, 100), (300, 10)]) == {0: 150, 1: 200, 2: 310}


def test_different_sizes_end_in_order_of_size_as_in_the_closed_form() -> None:
    """All start at 0: the kth smallest ends after the sum over j of min(b_j, b_k), at a byte a nanosecond."""
    sizes = [70, 10, 40, 40, 5]
    assert ends(NS, [(0, size) for size in sizes]) == {
        k: sum(min(size, other) for other in sizes) for k, size in enumerate(sizes)
    }


def slow_reference(bandwidth: int, starts: list[tuple[int, int]]) -> dict[int, int]:
    """From event to event, with everybody's remaining bytes as fractions."""
    left: dict[int, Fraction] = {}
    now, done, waiting = Fraction(0), {}, list(enumerate(starts))
    while left or waiting:
        rate = Fraction(bandwidth, NS * max(1, len(left)))
        next_end = min((now + b / rate for b in left.values()), default=None)
        next_start = waiting[0][1][0] if waiting else None
        if next_end is None or (next_start is not None and next_start < next_end):
            at = Fraction(next_start)  # type: ignore[arg-type]
        else:
            at = next_end
        left = {number: b - rate * (at - now) for number, b in left.items()}
        now = at
        for number in [number for number, b in left.items() if b == 0]:
            done[number] = math.ceil(now)
            del left[number]
        if waiting and waiting[0][1][0] == now and (next_end is None or next_end != at):
            number, (_, num_bytes) = waiting.pop(0)
            left[number] = Fraction(num_bytes)
    return done


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 10**10),
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 300)), min_size=1, max_size=12),
)
def test_ends_are_those_of_a_slow_reference_to_the_nanosecond(bandwidth: int, gaps: list[tuple[int, int]]) -> None:
    at, starts = 0, []
    for gap, num_bytes in gaps:
        at += gap
        starts.append((at, num_bytes))
    assert ends(bandwidth, starts) == slow_reference(bandwidth, starts)


def test_who_is_cancelled_leaves_its_share_to_the_others() -> None:
    link = Link(NS)
    link.start(0, 100, 0)
    link.start(1, 100, 0)
    link.cancel(0, 100)  # both have 50 left
    assert link.next_end() == 150
    assert link.ended(150) == [1]
    assert link.next_end() is None


@pytest.mark.parametrize(("bandwidth", "expected"), [(1e9, 20 + 7), (3e9, 7 + 7), (math.inf, 7)])
def test_an_idle_link_takes_the_bytes_over_the_bandwidth_and_the_latency(bandwidth: float, expected: int) -> None:
    assert LinkSpeed(bandwidth, 10, latency_ns=7).transfer_ns(2) == expected
    assert LinkSpeed(bandwidth, 10, latency_ns=7).transfer_ns(0) == 0


def test_each_replica_has_a_link_of_its_own_and_the_latency_comes_after_the_last_byte() -> None:
    env = simpy.Environment()
    network = Network(env, [LinkSpeed(1e9, 10, latency_ns=3)] * 3)
    seen: list[tuple[str, int, bool]] = []

    def watch(name: str, source: int, blocks: int):
        arrived = yield network.send(source, 2, blocks).done
        seen.append((name, int(env.now), arrived))

    for name, source, blocks in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1), ("nothing", 0, 0)):
        env.process(watch(name, source, blocks))
    env.run()
    assert seen == [("nothing", 0, True), ("c", 13, True), ("a", 23, True), ("b", 33, True)]


def test_what_a_failed_replica_sends_or_is_sent_does_not_arrive_and_the_rest_goes_faster() -> None:
    env = simpy.Environment()
    network = Network(env, [LinkSpeed(1e9, 10)] * 3)
    seen: list[tuple[str, int, bool]] = []

    def watch(name: str, source: int, target: int):
        arrived = yield network.send(source, target, 10).done
        seen.append((name, int(env.now), arrived))

    for name, source, target in (("to 1", 0, 1), ("to 2", 0, 2), ("from 1", 1, 2)):
        env.process(watch(name, source, target))
    env.run(until=40)
    network.fail(1)
    env.run()
    assert seen == [("to 1", 40, False), ("from 1", 40, False), ("to 2", 120, True)]


def test_over_a_link_that_is_down_nothing_arrives_until_it_is_up_again_and_others_are_not_affected() -> None:
    env = simpy.Environment()
    network = Network(env, [LinkSpeed(1e9, 10)] * 3)
    seen: list[tuple[str, int, bool]] = []

    def watch(name: str, source: int, target: int, at: int):
        yield env.timeout(at)
        arrived = yield network.send(source, target, 10).done
        seen.append((name, int(env.now), arrived))

    for name, source, target, at in (("on its way", 0, 1, 0), ("meanwhile", 0, 2, 60), ("later", 0, 2, 90),
                                     ("other way", 1, 0, 0), ("elsewhere", 2, 1, 0)):  # fmt: skip
        env.process(watch(name, source, target, at))
    env.run(until=40)
    network.cut(0)
    env.run(until=80)
    network.mend(0)
    env.run()
    assert seen == [("on its way", 40, False), ("meanwhile", 60, False), ("other way", 100, True),
                    ("elsewhere", 100, True), ("later", 190, True)]  # fmt: skip


@pytest.mark.parametrize("latency", [0, 5])
def test_who_is_aborted_in_the_moment_of_its_end_leaves_nobody_behind_on_its_link(latency: int) -> None:
    env = simpy.Environment()
    network = Network(env, [LinkSpeed(1e9, 10, latency_ns=latency)] * 2)
    moment = env.timeout(30)  # the last byte of the first leaves then; before the network looks
    first, second, third = (network.send(0, 1, blocks) for blocks in (1, 2, 4))
    moment.callbacks.append(lambda _: network.abort(first))
    env.run()
    assert second.done.triggered
    assert third.done.triggered


@pytest.mark.parametrize(
    ("speed", "message"),
    [
        ((0.0, 64), "bandwidth must be above 0, not 0.0"),
        ((math.nan, 64), "bandwidth must be above 0, not nan"),
        ((1e9, 0), "a block at least a byte"),
        ((1e9, 64, -1), "latency must be at least 0"),
    ],
)
def test_what_is_no_speed_is_refused(speed: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinkSpeed(*speed)
