"""What the requests of a trace share at their beginnings, and what caches of given sizes would hit, in one pass.

The rule: blocks of a request are looked up from the first one on, and counting stops at the first that is not there;
the matched tokens are `min(matched blocks * block, prompt tokens)`. After the request its blocks are touched, tail
first, so that its head is the most recent, and then the oldest blocks beyond the cache's size go (LRU). Who is still in
flight is matched too, so an endless cache's rate is a bound for any cache.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.workloads.stats import length_stats

CAPACITIES = (500, 1_000, 2_000, 5_000, 10_000, 20_000, 30_000, 50_000, 100_000)
"""Blocks of the caches of a curve where nobody says which."""


class LruCurve:
    """LRU caches of several sizes at once: the recency stack, cut at the sizes.

    What a cache of C blocks holds are the C blocks at the top of the stack. `_segments[k]` are those between the sizes
    k - 1 and k, oldest first; `_depth` says in which segment a block is, and nothing of those below all, or never seen.
    """

    def __init__(self, capacities: Sequence[int]) -> None:
        self.capacities = sorted(set(capacities))
        if any(capacity < 1 for capacity in self.capacities):
            raise ValueError(f"a cache holds at least 1 block, not {self.capacities[0]}")
        self._segments: list[OrderedDict[int, None]] = [OrderedDict() for _ in self.capacities]
        self._rooms = [size - below for size, below in zip(self.capacities, [0, *self.capacities], strict=False)]
        self._depth: dict[int, int] = {}

    def serve(self, ids: Sequence[int]) -> list[int]:
        """How many of a request's first blocks each cache has; then its blocks are the most recent, its head first."""
        hits, deepest = [0] * len(self.capacities), 0
        below, depth = len(self.capacities), self._depth
        for place, each in enumerate(ids):
            at = depth.get(each, below)
            if at > deepest:
                hits[deepest:at] = [place] * (at - deepest)
                deepest = at
                if at == below:
                    break
        hits[deepest:] = [len(ids)] * (below - deepest)
        self._touch(ids)
        return hits

    def _touch(self, ids: Sequence[int]) -> None:
        depth, segments = self._depth, self._segments
        if not segments:
            return
        top = segments[0]
        for each in reversed(ids):
            at = depth.get(each)
            if at == 0:
                top.move_to_end(each)
                continue
            if at is not None:
                del segments[at][each]
            top[each] = None
            depth[each] = 0
        for at, (segment, room) in enumerate(zip(segments, self._rooms, strict=True)):
            while len(segment) > room:
                oldest, _ = segment.popitem(last=False)
                if at + 1 < len(segments):
                    segments[at + 1][oldest] = None
                    depth[oldest] = at + 1
                else:
                    del depth[oldest]


class PrefixSharing:
    """Counts requests one by one, in their order; `figures` at the end.

    `capacities`: of the LRU caches. An endless cache is always there.
    """

    def __init__(self, block: int, capacities: Sequence[int] = CAPACITIES) -> None:
        self.block = block
        self._lru = LruCurve(capacities)
        self._lru_matched = [0] * len(self._lru.capacities)
        self._uses: Counter[int] = Counter()
        self._of_session: dict[int, set[int]] = {}
        self._new_tokens = array("q")
        self._tokens = self._references = self._matched_blocks = self._within = 0
        self._shares = 0.0

    def add(self, tokens: int, ids: Sequence[int], session: int | None = None) -> None:
        """The next request: its prompt's length, the ids of its blocks and whose it is."""
        uses = self._uses
        hits = next((i for i, each in enumerate(ids) if each not in uses), len(ids))
        matched = min(hits * self.block, tokens)
        self._tokens += tokens
        self._references += len(ids)
        self._matched_blocks += hits
        self._shares += matched / tokens if tokens else 0.0
        self._new_tokens.append(tokens - matched)
        if session is not None:
            own = self._of_session.setdefault(session, set())
            hits = next((i for i, each in enumerate(ids) if each not in own), len(ids))
            self._within += min(hits * self.block, tokens)
            own.update(ids)
        uses.update(ids)
        for at, hits in enumerate(self._lru.serve(ids)):
            self._lru_matched[at] += min(hits * self.block, tokens)

    def figures(self) -> dict[str, Any]:
        """Rates are shares of the prompts' tokens unless they say otherwise. `lru`: rate by capacity."""
        requests, distinct = len(self._new_tokens), len(self._uses)
        endless = self._tokens - sum(self._new_tokens)
        return {
            "block_tokens": self.block,
            "block_references": self._references,
            "distinct_blocks": distinct,
            "used_once": _share(sum(count == 1 for count in self._uses.values()), distinct),
            "hit_rate": _share(endless, self._tokens),
            "hit_rate_blocks": _share(self._matched_blocks, self._references),
            "hit_rate_mean_request": _share(self._shares, requests),
            "hit_rate_within_session": _share(self._within, self._tokens) if self._of_session else None,
            "new_tokens": length_stats(np.array(self._new_tokens)),
            "lru": {
                capacity: _share(matched, self._tokens)
                for capacity, matched in zip(self._lru.capacities, self._lru_matched, strict=True)
            },
        }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
