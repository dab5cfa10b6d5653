"""Programs of calls: a call may come when another one has ended, some time after it."""

from __future__ import annotations

from dataclasses import dataclass

from policies.replica_state import Limits
from policies.stack import StackSpec
from tests.policies.harness import STEP_NS, Drive, Job


@dataclass
class Call(Job):
    """`after`: the calls (by place in the list) that end before it comes, `gap` steps before; they are its parents."""

    after: tuple[int, ...] = ()
    gap: int = 0
    named: bool = True  # whether it names its parents


class ProgramDrive(Drive):
    """Calls without `after` arrive as jobs do, the others when those have ended; `came` and `gone` say when, in ns."""

    def __init__(self, limits: Limits, stack: StackSpec, calls: list[Call], *, max_plans: int = 20_000) -> None:
        self.calls = calls
        self.came: dict[int, int] = {}
        super().__init__(limits, stack, calls, max_plans=max_plans)  # type: ignore[arg-type]

    def _deliver(self, now: int) -> None:
        everybody = self._left_to_arrive
        first = [i for i in everybody if not self.calls[i].after]
        ready = [i for i in everybody if self.calls[i].after and self._due(i) <= now]
        index, idle = self.plane.next_step, not self.plane.num_live
        for i in first:
            if self.calls[i].arrives <= index or (idle and not ready and len(everybody) == len(first)):
                ready.append(i)
                idle = False
        for i in sorted(ready, key=lambda i: (self._due(i), i)):
            everybody.remove(i)
            request, call = self.requests[i], self.calls[i]
            request.arrival_ns = self.came[i] = now
            request.parents = call.after if call.named else ()
            self.plane.submit(request, now, call.keys)
        while self._cancels and self._cancels[0][0] <= index:
            self.plane.cancel(self._cancels.pop(0)[1], now)

    def _due(self, i: int) -> int:
        """When it comes: `gap` steps after the last of those that it follows; -1 for who follows nobody."""
        ends = [self.requests[j].finish_ns for j in self.calls[i].after]
        known = [end for end in ends if end is not None]
        return max(known, default=-1) + self.calls[i].gap * STEP_NS if len(known) == len(ends) else 1 << 62

    def waited(self) -> int:
        """Steps between arrival and end in which a call did not run, summed. A call runs as many as it has tokens."""
        spans = ((r.finish_ns or 0) - self.came[r.id] for r in self.requests)
        return sum(spans) // STEP_NS - sum(call.output for call in self.calls)


def chain(program: int, *lengths: int, start: int = 0, named: bool = True, gap: int = 0) -> list[Call]:
    """Calls of one token of prompt, each after the one before; `start` is the place of the first in the whole list."""
    return [
        Call(1, length, program=program, after=(start + i - 1,) if i else (), named=named, gap=gap)
        for i, length in enumerate(lengths)
    ]


def chains(*lengths: tuple[int, ...], named: bool = True) -> list[Call]:
    """One program each, numbered from 0."""
    made: list[Call] = []
    for program, each in enumerate(lengths):
        made += chain(program, *each, start=len(made), named=named)
    return made
