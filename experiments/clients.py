"""What a workload's clients do: who comes when others have ended, who gives up, and who tries again.

A client that has no whole answer `timeout_ns` after it came gives up: its request is cancelled. It tries again at once,
up to `retries` times. Each try is a request of its own: try k of the workload's request i has the id i + k * n, n being
the number of the workload's requests. What follows from a request follows from its last try.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.workloads import Workload
from experiments.workloads.closed_loop import Followers


@dataclass(frozen=True, slots=True)
class Patience:
    """How long clients wait, None: for ever; and how often they try again."""

    timeout_ns: int | None = None
    retries: int = 0


@dataclass(slots=True)
class Clients:
    """Who comes, in both panels. `waiting`: how many tries, begun or to come, are still to end."""

    workload: Workload
    patience: Patience = Patience()
    waiting: int = field(init=False)
    _followers: Followers = field(init=False)
    _given_up: set[int] = field(init=False, default_factory=set)
    _last_try: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.waiting = len(self.workload)
        self._followers = Followers(self.workload)

    def first(self) -> list[tuple[int, int]]:
        """(when, id) of those that come because nobody has ended, in order."""
        parents = self.workload.parents
        times = self.workload.arrival_ns.tolist()
        return [(at, i) for i, at in enumerate(times) if parents is None or not parents[i]]

    def row(self, request_id: int) -> tuple[int, int]:
        """The number in the workload, and of the try (from 0)."""
        tried, i = divmod(request_id, len(self.workload))
        return i, tried

    def parents(self, request_id: int) -> tuple[int, ...]:
        """Ids of those after whose ends it comes."""
        of = () if self.workload.parents is None else self.workload.parents[self.row(request_id)[0]]
        return tuple(self._last_try.get(parent, parent) for parent in of)

    def gives_up(self, request_id: int, now: int) -> list[tuple[int, int]]:
        """Its time is over, and it has not ended: (when, id) of the next try, if there is one."""
        i, tried = self.row(request_id)
        if tried == self.patience.retries:
            return []
        self._given_up.add(request_id)
        self.waiting += 1
        self._last_try[i] = request_id + len(self.workload)
        return [(now, request_id + len(self.workload))]

    def ended(self, request_id: int, now: int) -> list[tuple[int, int]]:
        """(when, id) of those that come because of that, in order."""
        self.waiting -= 1
        if request_id in self._given_up:
            self._given_up.discard(request_id)
            return []
        return self._followers.ended(self.row(request_id)[0], now)
