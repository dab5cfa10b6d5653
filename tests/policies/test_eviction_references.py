"""Eviction policies against slow references: a list of pages that is searched for every victim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.random_stream import RandomStream
from tests.policies.caches import (
    faults,
    skewed,
)


def by_key(key: Callable[[dict[str, int], float], Any]) -> Callable[[Sequence[int], int], int]:
    """Faults of a cache that evicts the page with the least `key(page, L)`; L is the key of the last victim."""

    def count(string: Sequence[int], frames: int) -> int:
        cached: dict[int, dict[str, int]] = {}
        ever: dict[int, int] = {}
        inflation, missed = 0.0, 0
        for now, page in enumerate(string):
            if page not in cached:
                missed += 1
                if len(cached) == frames:
                    victim = min(cached, key=lambda p: (cached[p]["rank"], cached[p]["last"]))
                    inflation = cached[victim]["rank"]
                    del cached[victim]
                cached[page] = {"entered": now, "hits": 0, "ever": ever.get(page, 0)}
            else:
                cached[page]["hits"] += 1
            ever[page] = ever.get(page, 0) + 1
            cached[page]["last"] = now
            cached[page]["rank"] = key(cached[page], inflation)
        return missed

    return count


def arc_faults(string: Sequence[int], frames: int, *, room_first: bool = True) -> int:
    """ARC as the paper has it, on plain lists (oldest first); `room_first`: it evicts before it knows of ghosts."""
    t1: list[int] = []
    t2: list[int] = []
    b1: list[int] = []
    b2: list[int] = []
    p, missed = 0.0, 0

    def replace(in_b2: bool) -> None:
        if t1 and (len(t1) > p or (in_b2 and len(t1) == p) or not t2):
            b1.append(t1.pop(0))
        else:
            b2.append(t2.pop(0))

    for page in string:
        if page in t1 or page in t2:
            (t1 if page in t1 else t2).remove(page)
            t2.append(page)
            continue
        missed += 1
        full = len(t1) + len(t2) == frames
        if room_first and full:
            replace(False)
        if page in b1:
            p = min(frames, p + max(1, len(b2) / len(b1)))
            if not room_first and full:
                replace(False)
            b1.remove(page)
            t2.append(page)
        elif page in b2:
            p = max(0, p - max(1, len(b1) / len(b2)))
            if not room_first and full:
                replace(True)
            b2.remove(page)
            t2.append(page)
        else:
            if not room_first and full:
                if len(t1) == frames:
                    t1.pop(0)
                else:
                    if len(t1) + len(b1) == frames:
                        b1.pop(0)
                    elif len(t1) + len(t2) + len(b1) + len(b2) == 2 * frames:
                        b2.pop(0)
                    replace(False)
            t1.append(page)
            if len(t1) + len(b1) > frames:
                b1.pop(0)
            if len(t1) + len(t2) + len(b1) + len(b2) > 2 * frames:
                b2.pop(0)
        assert len(t1) + len(t2) <= frames
    return missed


def s3_fifo_faults(string: Sequence[int], frames: int) -> int:
    """Algorithm 1 of the paper, on plain lists (tail first)."""
    small: list[int] = []
    main: list[int] = []
    ghosts: list[int] = []
    hits: dict[int, int] = {}
    missed = 0

    def evict() -> None:
        while True:
            if small and (len(small) >= 0.1 * frames or not main):
                page = small.pop(0)
                if hits[page] <= 1:
                    ghosts.append(page)
                    del ghosts[: max(0, len(ghosts) - int(0.9 * frames))]
                    return
                main.append(page)
                hits[page] = 0
            else:
                page = main.pop(0)
                if hits[page] == 0:
                    return
                main.append(page)
                hits[page] -= 1

    for page in string:
        if page in small or page in main:
            hits[page] = min(hits[page] + 1, 3)
            continue
        missed += 1
        if len(small) + len(main) == frames:
            evict()
        hits[page] = 0
        if page in ghosts:
            ghosts.remove(page)
            main.append(page)
        else:
            small.append(page)
    return missed


SLOW: dict[str, Callable[[Sequence[int], int], int]] = {
    "lru": by_key(lambda page, L: 0),
    "fifo": by_key(lambda page, L: page["entered"]),
    "lfu": by_key(lambda page, L: page["hits"]),
    "lfu,remember=true": by_key(lambda page, L: page["hits"] + page["ever"]),
    "slru": by_key(lambda page, L: page["hits"] >= 2),
    "gdsf": by_key(lambda page, L: L + 1 + page["hits"]),
    "gdsf,remember=true": by_key(lambda page, L: L + 1 + page["hits"] + page["ever"]),
    "arc": arc_faults,
    "s3_fifo": s3_fifo_faults,
}


@pytest.mark.parametrize("policy", SLOW)
@settings(max_examples=40, deadline=None)
@given(skewed, st.integers(1, 8))
def test_a_policy_hits_what_its_slow_reference_hits(policy: str, string: list[int], frames: int) -> None:
    assert faults(string, policy, frames) == SLOW[policy](string, frames)


@pytest.mark.parametrize("policy", SLOW)
def test_a_policy_hits_what_its_slow_reference_hits_on_a_long_string(policy: str) -> None:
    string = zipf_string(4000, 200)
    for frames in (10, 40):
        assert faults(string, policy, frames) == SLOW[policy](string, frames)


def zipf_string(length: int, pages: int) -> list[int]:
    """Popular pages with a scan over all of them now and then; the same each time."""
    draw = RandomStream(7, "zipf").uniform_array(list(range(length)))
    string = [int(pages**u) - 1 for u in draw.tolist()]
    for at in range(500, length, 1000):
        string[at : at + pages // 2] = range(pages // 2)
    return string


def test_making_room_before_looking_for_ghosts_costs_arc_next_to_nothing() -> None:
    string = zipf_string(6000, 400)
    for frames in (20, 60, 150):
        ours, papers = faults(string, "arc", frames), arc_faults(string, frames, room_first=False)
        assert abs(ours - papers) < 0.01 * len(string)
        assert ours < faults(string, "lru", frames)


def test_remembered_counts_outlive_their_blocks() -> None:
    string = [0, 0, 0, 1, 1, 1, 2, 2, 0, 3, 3, 3, 3, 0, 4, 4, 0]
    assert faults(string, "lfu,remember=true", 2) == SLOW["lfu,remember=true"](string, 2)
    assert faults(string, "lfu,remember=true", 2) < faults(string, "lfu", 2)
