"""The requests that only decode, advanced together by one counter.

A step in which everybody decodes would touch every running request to add one to two numbers. Here the members keep
their counts relative to a shared `clock`, and the step adds one to the clock. What happens to single members is found
without looking at the others: who needs a block next (a ring of buckets by position within a block), who reaches its
cap (a heap by clock), and the sums that a step's cost depends on.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection

from policies.request import Request

NEVER = 1 << 62
"""A clock that is not reached."""


class DecodeGroup:
    """Members in order of joining. Costs: join and leave O(log n), a step O(members it changes)."""

    def __init__(self, block_size: int) -> None:
        self.clock = 0
        self.members: dict[int, Request] = {}
        self._block_size = block_size
        self._ring: list[dict[int, Request]] = [{} for _ in range(block_size)]
        self._caps: list[tuple[int, int]] = []  # (clock at which the cap is reached, id)
        self._longest: list[tuple[int, int]] = []  # (-relative length, id)
        self._relative_sum = 0

    def __len__(self) -> int:
        return len(self.members)

    def join(self, request: Request) -> None:
        """Take in a request with one token to compute."""
        clock = self.clock
        request._computed -= clock
        request._tokens -= clock
        request._group = self
        request._decode_runs.append(clock)
        relative = request._computed
        self.members[request.id] = request
        self._ring[relative % self._block_size][request.id] = request
        heapq.heappush(self._longest, (-relative, request.id))
        heapq.heappush(self._caps, self._cap_of(request))
        self._relative_sum += relative
        if max(len(self._longest), len(self._caps)) > 2 * len(self.members) + 64:
            self._forget_stale_entries()

    def leave(self, request: Request) -> None:
        """Let a member go, with its counts made absolute again."""
        relative = request._computed
        del self.members[request.id]
        del self._ring[relative % self._block_size][request.id]
        self._relative_sum -= relative
        clock = self.clock
        request._computed += clock
        request._tokens += clock
        request._group = None
        request._decode_runs.append(clock)

    def at_block_boundary(self) -> Collection[Request]:
        """Members whose next token opens a new block, as they stand: not to be kept."""
        return self._ring[-self.clock % self._block_size].values()

    def advance(self) -> list[Request]:
        """One token for every member. Returns those that have now reached their cap; they have left."""
        self.clock += 1
        capped: list[Request] = []
        while self._caps and self._caps[0][0] <= self.clock:
            request = self.members.get(heapq.heappop(self._caps)[1])
            # A member that has left, or that left and came back later, leaves a stale entry behind.
            if request is not None and request.num_output_tokens >= request.max_tokens:
                self.leave(request)
                capped.append(request)
        return capped

    def next_cap(self) -> int:
        """The clock at which a member reaches its cap."""
        caps = self._caps
        while caps:
            member = self.members.get(caps[0][1])
            if member is not None and self._cap_of(member) == caps[0]:
                return caps[0][0]
            heapq.heappop(caps)  # that of one who has left
        return NEVER

    def _cap_of(self, member: Request) -> tuple[int, int]:
        return (self.clock + member.max_tokens - member.num_output_tokens, member.id)

    def _forget_stale_entries(self) -> None:
        members = self.members.values()
        self._longest = [(-member._computed, member.id) for member in members]
        self._caps = [self._cap_of(member) for member in members]
        heapq.heapify(self._longest)
        heapq.heapify(self._caps)

    @property
    def context(self) -> int:
        """Computed tokens, summed over the members."""
        return self._relative_sum + len(self.members) * self.clock

    @property
    def longest(self) -> int:
        """Computed tokens of the longest member, 0 without members."""
        heap = self._longest
        while heap:
            relative, request_id = heap[0]
            member = self.members.get(request_id)
            if member is not None and member._computed == -relative:
                return self.clock - relative
            heapq.heappop(heap)
        return 0
