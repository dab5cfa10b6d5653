"""What rules for choosing a victim have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
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
    _prices: dict[tuple[Callable[[CostModel, int], int], int], int]  # by that cost model

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
        assert view.cost is not None, "a policy that needs a cost model is never put where there is none"
        if view.cost is not self._cost:
            self._cost, self._prices = view.cost, {}
        recompute = self._price(prefill_ns, request.num_tokens)
        if not view.num_host_blocks or not draft.can_swap(request):
            return recompute, float("inf")
        return recompute, self._price(
            swap_ns, num_blocks(request.num_computed_tokens, view.block_size) * view.block_size
        )

    def _price(self, of: Callable[[CostModel, int], int], num_tokens: int) -> int:
        """Each is asked of the cost model once: there are as many as a sequence can have tokens."""
        if (of, num_tokens) not in self._prices:
            assert self._cost is not None
            self._prices[of, num_tokens] = of(self._cost, num_tokens)
        return self._prices[of, num_tokens]


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
