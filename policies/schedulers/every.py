from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from policies import registry
from policies.contract import Queue, Scheduler, View
from policies.draft import Draft
from policies.plan import Plan, Report
from policies.registry import register
from policies.request import Request, State


@register("scheduler", "every")
class Every:
    """Multi-step scheduling: another scheduler decides every `n` steps, and in between the same requests decode.

    `inner` is that scheduler, with its knobs behind slashes: `every,n=8,inner=sarathi/chunk_size=256`. Between its
    decisions those decode whom the last one let decode: everybody, or, of a scheduler that holds some back, the others
    (and whose prompt it completed). Nobody is admitted and nobody is stopped, except that a decode without a block
    takes one by the stack's preemption rule; a request that ends leaves its place empty until the next decision
    (over-provisioning). While a prompt is being computed, and after a plan that lets nobody decode (prefills alone, a
    batch that is forming), `inner` decides at once. With n=1 it is `inner`.

    A scheduler that counts its steps, such as `scorpio`, has a method `on_repeat`, which is called for each in between.

    What it saves in a real engine is the planning of n-1 steps; its price is that arrivals wait for up to n of them.
    Cost: as `inner` every n steps, else O(decodes that open a block).
    Source: vLLM v0.6's multi-step scheduling; Agentix (Luo et al., NSDI 2026) and JITServe (NSDI 2026, every 50 steps)
    run theirs at intervals too.
    """

    def __init__(
        self,
        queue: Queue,
        n: int = 8,
        inner: str = "mixed",
        block_size: int = 16,
        seed: int = 0,
        oracle: Mapping[int, int] | None = None,
    ) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        context = {"queue": queue, "block_size": block_size, "seed": seed, "oracle": oracle}
        self._inner: Scheduler = registry.make_inner("scheduler", inner, **context)
        self._n = n
        self._undecided = 0  # steps since the last decision that let anybody decode, it included
        self._decode: list[Request] | None = None  # whom it let decode; None: everybody
        self.clairvoyant = registry.is_clairvoyant(self._inner)
        self.needs_cost: bool = getattr(self._inner, "needs_cost", False)

    def add(self, request: Request, now: int) -> None:
        self._inner.add(request, now)

    def remove(self, request: Request, now: int) -> None:
        self._inner.remove(request, now)

    def on_report(self, report: Report) -> None:
        self._inner.on_report(report)

    def plan(self, view: View, now: int) -> Plan:
        if 0 < self._undecided < self._n and view.num_decoding and not view.prefilling:
            draft = view.draft()
            self._repeat(draft, now)
            if draft.num_tokens:
                self._undecided += 1
                if isinstance(self._inner, CountsSteps):
                    self._inner.on_repeat()
                return draft.finish()
        plan = self._inner.plan(view, now)
        plan.repeats = 1  # the steps after a decision are counted
        self._undecided = int(plan.decode_all or bool(plan.decodes))
        self._decode = None if plan.decode_all else [*plan.decodes, *(request for request, _ in plan.chunks)]
        return plan

    def _repeat(self, draft: Draft, now: int) -> None:
        if self._decode is None:
            draft.run_decodes(now)
            return
        for request in self._decode:
            decodes = request.state is State.RUNNING and request.num_pending_tokens == 1
            if decodes and request.id not in draft.preempted and draft.tokens_left:
                draft.run_or_preempt(request, 1, now)


@runtime_checkable
class CountsSteps(Protocol):
    """A scheduler that goes by how many steps there were, its own and those that repeat one."""

    def on_repeat(self) -> None:
        """The decodes of its last plan run once more."""
        ...
