"""What rules for choosing a victim have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from policies.contract import View
from policies.draft import Draft
from policies.plan import Mode
from policies.request import Request


class Taking:
    """How memory is taken from a victim. `mode`: `recompute`, or `swap`, which recomputes too where the host has no
    room for what the victim has computed. Raises ValueError for another one."""

    _swaps = False

    def __init__(self, mode: str = "recompute") -> None:
        if mode not in ("recompute", "swap"):
            raise ValueError(f"mode must be recompute or swap, not {mode!r}")
        self._swaps = mode == "swap"

    def mode_for(self, request: Request, view: View, draft: Draft) -> Mode:
        """How this one's memory is taken."""
        return Mode.SWAP if self._swaps and draft.can_swap(request) else Mode.RECOMPUTE


class RankedVictim(Taking, ABC):
    """Preempts the running request that stands last by a rank, ties by (arrival, id).

    Under a rank that a request's own progress makes worse, two long prompts in chunks would take the memory from each
    other for ever, each when it is ahead. Such a rule says `spares_eldest`: who was admitted first, of those that run,
    is not preempted while there are others, so it gets to its end. Under a rank that is fixed or gets better with
    output tokens the first in it does. Asked once a victim; O(running), times what the rank costs.
    """

    spares_eldest = False

    @abstractmethod
    def rank(self, request: Request, view: View, draft: Draft, now: int) -> Any:
        """The larger, the sooner it is preempted. Comparable among all running requests."""

    def victim(self, view: View, draft: Draft, now: int) -> tuple[Request, Mode] | None:
        running = [request for request in view.running.values() if request.id not in draft.preempted]
        if not running:
            return None
        if self.spares_eldest and len(running) > 1:
            del running[0]
        last = max(running, key=lambda r: (self.rank(r, view, draft, now), *r.key))
        return last, self.mode_for(last, view, draft)
