"""What rules for choosing a victim have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from policies.block_pool import num_blocks
from policies.contract import CostModel, View
from policies.costing import prefill_ns, swap_ns
from policies.draft import Draft
from policies.plan import Mode
from policies.request import Request

MODES = ("recompute", "swap", "cheapest")


class Taking:
    """How memory is taken from a victim.

    `mode`: `recompute`; `swap`; or `cheapest`, which takes for each victim what the cost model says is cheaper:
    computing its context again in one step of its own, what the prefix cache will still hold then not counted on, or
    copying the blocks that it fills to the host and back. Where the host has no room for what the victim has computed,
    all recompute. Raises ValueError for another one.
    """

    needs_cost = False
    _mode = "recompute"
    _cost: CostModel | None = None
    _recompute_ns: dict[int, int]  # by tokens, by that cost model
    _swap_ns: dict[int, int]

    def __init__(self, mode: str = "recompute") -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be {', '.join(MODES[:-1])} or {MODES[-1]}, not {mode!r}")
        self._mode = mode
        self.needs_cost = mode == "cheapest"

    def mode_for(self, request: Request, view: View, draft: Draft) -> Mode:
        """How this one's memory is taken."""
        if self._mode == "recompute" or not view.num_host_blocks or not draft.can_swap(request):
            return Mode.RECOMPUTE
        if self._mode == "swap":
            return Mode.SWAP
        recompute, swap = self.costs(request, view, draft)
        return Mode.SWAP if swap < recompute else Mode.RECOMPUTE

    def costs(self, request: Request, view: View, draft: Draft) -> tuple[float, float]:
        """Nanoseconds that recomputing and swapping a victim cost, by the cost model; a full host is no way."""
        recompute, swap = self.prices(request, view)
        return recompute, swap if view.num_host_blocks and draft.can_swap(request) else float("inf")

    def prices(self, request: Request, view: View) -> tuple[float, float]:
        """The same with all of the host's memory free. Each length is asked of the cost model once."""
        cost, tokens = view.cost, request.num_tokens
        assert cost is not None, "a policy that needs a cost model is never put where there is none"
        if cost is not self._cost:
            self._cost, self._recompute_ns, self._swap_ns = cost, {}, {}
        recompute = self._recompute_ns.get(tokens)
        if recompute is None:
            recompute = self._recompute_ns[tokens] = prefill_ns(cost, tokens)
        if not view.num_host_blocks:
            return recompute, float("inf")
        filled = num_blocks(request.num_computed_tokens, view.block_size) * view.block_size
        swap = self._swap_ns.get(filled)
        if swap is None:
            swap = self._swap_ns[filled] = swap_ns(cost, filled)
        return recompute, swap


class RankedVictim(Taking, ABC):
    """Preempts the running request that stands last by a rank, ties by (arrival, id).

    Under a rank that a request's own progress makes worse, two long prompts in chunks would take the memory from each
    other for ever, each when it is ahead. Such a rule says `spares_eldest`: who was admitted first, of those that run,
    is not preempted while there are others, so it gets to its end. Under a rank that is fixed or gets better with
    output tokens the first in it does.

    O(running log running) a plan that preempts, by `ceiling`. A victim then costs the ranks of those whose ceiling is
    above its rank: where the two are the same, its own alone.
    """

    spares_eldest = False
    _draft: Draft | None = None
    _line: Sequence[tuple[Any, int, int, Request]] = ()  # who ran before this draft, the highest ceiling first

    @abstractmethod
    def rank(self, request: Request, view: View, draft: Draft, now: int) -> Any:
        """The larger, the sooner it is preempted. Comparable among all running requests."""

    def ceiling(self, request: Request, view: View, draft: Draft, now: int) -> Any:
        """At least its rank, whomever the draft will have stopped. The rank itself, unless that depends on it."""
        return self.rank(request, view, draft, now)

    def victim(self, view: View, draft: Draft, now: int) -> tuple[Request, Mode] | None:
        if draft is not self._draft:
            everybody = view.running.values()
            line = [(self.ceiling(r, view, draft, now), r.arrival_ns, r.id, r) for r in everybody]
            self._draft, self._line = draft, sorted(line, reverse=True)
        gone = draft.preempted
        spared = self._spared(view, draft)
        last, most = None, None
        for ceiling, arrival, request_id, request in self._line:
            if most is not None and most > (ceiling, arrival, request_id):
                break
            if request_id not in gone and request is not spared:
                place = (self.rank(request, view, draft, now), arrival, request_id)
                if most is None or place > most:
                    last, most = request, place
        return None if last is None else (last, self.mode_for(last, view, draft))

    def _spared(self, view: View, draft: Draft) -> Request | None:
        """Who was admitted first of those left, if it is not alone."""
        if not self.spares_eldest or len(view.running) - len(draft.preempted) < 2:
            return None
        return next(request for request_id, request in view.running.items() if request_id not in draft.preempted)
