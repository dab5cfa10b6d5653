"""Which requests end in a step: the part of the executor that knows the true output lengths."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence

from policies.decode_group import NEVER
from policies.plan import Step
from policies.request import Request, State
from simulator.arrivals import Arrival


class Endings:
    """Finds the ends of a step at a cost that follows what changed: a heap by the decode group's clock."""

    def __init__(self) -> None:
        self._truth: dict[int, tuple[int, State]] = {}  # request id -> output tokens, how it ends
        self._due: list[tuple[int, int]] = []  # (decode clock, request id)
        self._members: dict[int, Request] = {}
        self._clock = 0

    def expect(self, arrival: Arrival) -> None:
        """This request will end after its output tokens, or at its cap."""
        self._truth[arrival.request.id] = _truth(arrival)

    def correct(self, arrival: Arrival) -> None:
        """Its output tokens are fewer than `expect` was told, and no fewer than it has."""
        request = arrival.request
        if request.id in self._truth:
            self._truth[request.id] = _truth(arrival)
            if request.id in self._members:
                self._push(request, self._clock)

    def of(self, step: Step) -> list[tuple[Request, State, int]]:
        """(request, how, output tokens) of those whose last token this step samples. Ask once, right after the plan."""
        ended: list[tuple[Request, State, int]] = []
        if step.decode_all:
            self._clock = step.decode_clock
        for chunk in step.chunks:
            if chunk.samples:
                self._check(chunk.request, ended)
        for request in step.decodes:
            self._check(request, ended)
        self.regroup(step.left, step.joined, step.decode_clock)
        for request in step.capped:
            self._members.pop(request.id, None)
            self._check(request, ended)
        while step.decode_all and self._due and self._due[0][0] <= step.decode_clock:
            request_id = heapq.heappop(self._due)[1]
            member = self._members.get(request_id)
            if member is None or request_id not in self._truth:
                continue  # it has left the group, or has ended
            if not self._check(member, ended):
                self._push(member, step.decode_clock)
        return ended

    def regroup(self, left: Sequence[Request], joined: Collection[Request], clock: int) -> None:
        """These have left the decode group, and these are in it from now on."""
        for request in left:
            self._members.pop(request.id, None)
        for request in joined:
            if request.id in self._truth:
                self._members[request.id] = request
                self._push(request, clock)

    def next_due(self, joining: Collection[Request], clock: int) -> int:
        """The decode clock at which the next member of the group may end, or one of those who are to join it now."""
        due = self._due
        while due and not (due[0][1] in self._members and due[0][1] in self._truth):
            heapq.heappop(due)
        first = due[0][0] if due else NEVER
        for request in joining:
            truth = self._truth.get(request.id)
            if truth is not None:
                first = min(first, clock + truth[0] - request.num_output_tokens)
        return first

    def _push(self, request: Request, clock: int) -> None:
        left = self._truth[request.id][0] - request.num_output_tokens
        heapq.heappush(self._due, (clock + left, request.id))

    def _check(self, request: Request, ended: list[tuple[Request, State, int]]) -> bool:
        truth = self._truth.get(request.id)
        if truth is None or request.num_output_tokens < truth[0]:
            return False
        del self._truth[request.id]
        self._members.pop(request.id, None)
        ended.append((request, truth[1], truth[0]))
        return True

    def take(self, request_id: int) -> tuple[int, State]:
        """The request goes on elsewhere: what `put` is to be told there."""
        self._members.pop(request_id, None)
        return self._truth.pop(request_id)

    def put(self, request_id: int, truth: tuple[int, State]) -> None:
        """The request goes on here."""
        self._truth[request_id] = truth

    def forget(self, request_id: int) -> None:
        """The request was cancelled, dropped or refused."""
        self._truth.pop(request_id, None)
        self._members.pop(request_id, None)


def _truth(arrival: Arrival) -> tuple[int, State]:
    cap = arrival.request.max_tokens_in_all
    end = arrival.end or (State.STOPPED if arrival.output_tokens < cap else State.LENGTH)
    return min(arrival.output_tokens, cap), end
