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

    Whoever is not preempted gets on in every step, and with nobody else left a request has all the memory, so no rank
    can livelock; a bad one makes much work for nothing. Asked once a victim; O(running), times what the rank costs.
    """

    @abstractmethod
    def rank(self, request: Request, view: View, draft: Draft, now: int) -> Any:
        """The larger, the sooner it is preempted. Comparable among all running requests."""

    def victim(self, view: View, draft: Draft, now: int) -> tuple[Request, Mode] | None:
        running = [request for request in view.running.values() if request.id not in draft.preempted]
        if not running:
            return None
        last = max(running, key=lambda r: (self.rank(r, view, draft, now), *r.key))
        return last, self.mode_for(last, view, draft)
