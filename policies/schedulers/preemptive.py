from __future__ import annotations

from collections.abc import Iterable

from policies.contract import Queue, RankedQueue, View
from policies.draft import ADMISSION, NO_BLOCKS, SLOTS, Draft
from policies.plan import Mode, Plan
from policies.queued import QueuedScheduler
from policies.registry import register
from policies.request import Request, State


@register("scheduler", "preemptive")
class Preemptive(QueuedScheduler):
    """Whoever is first in the queue's order runs, if need be in the place of those behind who run already.

    The order is one over all requests, running or not: `srpt`, `mlfq`, `edf`, ... are queues for it. First every
    running decode gets its token. Then prompt tokens are handed out in the queue's order, to partial prefills and to
    waiting requests alike; where slots or memory are missing for a waiting one, running requests behind it are
    preempted, the last first, as long as the queue lets them be. Nobody overtakes a waiting request that does not fit.
    A step that lacks blocks for its decodes takes them from paused requests, the last first, then by the stack's rule,
    and admits nobody.

    `mode`: `recompute` frees a preempted request's blocks; `keep` leaves them to it while only slots are wanted.
    Cost: O(prefills + decodes that open a block) while nobody waits who is ahead of somebody running, else
    O(running log running).
    """

    def __init__(self, queue: Queue, mode: str = "recompute", long_prefill_threshold: int = 0) -> None:
        super().__init__(queue)
        if not isinstance(queue, RankedQueue):
            raise ValueError(f"it needs a queue that orders running requests too; {type(queue).__name__} does not")
        if mode not in ("recompute", "keep"):
            raise ValueError(f"mode must be recompute or keep, not {mode!r}")
        if long_prefill_threshold < 0:
            raise ValueError(f"long_prefill_threshold must be 0 or more, not {long_prefill_threshold}")
        self._order: RankedQueue = queue
        self._keeps = mode == "keep"
        self._max_chunk = long_prefill_threshold or None

    def plan(self, view: View, now: int) -> Plan:
        draft = self.start(view, now)
        self._reclaim(view, draft, len(view.decodes_that_need_a_block()))
        draft.run_decodes(now)
        self._prefill_in_order(view, draft, now, admits=not draft.preempted)
        return draft.finish()

    def _reclaim(self, view: View, draft: Draft, blocks: int) -> None:
        """Take blocks back from paused requests until so many are free."""
        if blocks > draft.blocks_left and view.paused:
            named = self._named(draft)
            for request in reversed(self._in_order(r for r in view.paused.values() if r.id not in named)):
                if blocks <= draft.blocks_left:
                    return
                self._take_back(draft, request)

    def _take_back(self, draft: Draft, request: Request) -> None:
        self.queue.remove(request)
        draft.preempt(request, Mode.RECOMPUTE)

    def _prefill_in_order(self, view: View, draft: Draft, now: int, *, admits: bool) -> None:
        partial = self._in_order(r for r in view.prefilling.values() if r.id not in draft.preempted)[::-1]
        while draft.tokens_left > 0:
            head = self.queue.peek(now) if admits else None
            if partial and (head is None or self._order.order(partial[-1]) < self._order.order(head)):
                request = partial.pop()
                if request.id not in draft.preempted:
                    self._continue(view, draft, request, now)
            elif head is None:
                return
            elif self._admit(view, draft, head):
                self.queue.pop(now)
            else:
                admits = False  # nobody overtakes it; those that run go on

    def _continue(self, view: View, draft: Draft, request: Request, now: int) -> None:
        tokens = min(request.num_pending_tokens, draft.tokens_left, self._max_chunk or draft.tokens_left)
        self._reclaim(view, draft, draft.blocks_needed(request, tokens))
        draft.run_or_preempt(request, tokens, now)

    def _admit(self, view: View, draft: Draft, head: Request) -> bool:
        """Start a waiting request, if need be in the place of others. False, and nobody stopped, if that is vain."""
        if draft.admit(head, max_chunk=self._max_chunk):
            return True
        victims = self._behind(view, draft, head)
        if not self._enough(view, draft, head, victims, draft.plan.blocked[-1][1]):
            return False
        while victims:
            reason = draft.plan.blocked.pop()[1]
            victim = victims.pop()
            if victim.state is not State.PAUSED:
                draft.preempt(victim, Mode.KEEP if self._keeps and reason == SLOTS else Mode.RECOMPUTE)
            elif reason != SLOTS:  # of which it has none
                self._take_back(draft, victim)
            if draft.admit(head, max_chunk=self._max_chunk):
                return True
        return False

    def _behind(self, view: View, draft: Draft, head: Request) -> list[Request]:
        """Who may be stopped for it, in the queue's order: running ones and paused ones behind it."""
        place, order, named = self._order.order(head), self._order.order, self._named(draft)
        behind = [r for r in (*view.running.values(), *view.paused.values()) if r is not head and order(r) > place]
        return self._in_order(
            request
            for request in behind
            if request.id not in named
            and request.num_output_tokens < request.max_tokens  # else it only waits for its last report
            and (request.state is State.PAUSED or self._order.preemptible(request))
        )

    def _named(self, draft: Draft) -> set[int]:
        """Whom this plan stops, takes blocks back from, or resumes already: paused ones stay in the view meanwhile."""
        return {r.id for r, _ in draft.plan.preempt} | {r.id for r in draft.plan.resume}

    def _enough(self, view: View, draft: Draft, head: Request, victims: list[Request], reason: str) -> bool:
        """Whether stopping all of them could let it in."""
        if reason == SLOTS:
            return any(victim.state is not State.PAUSED for victim in victims)
        if reason not in (NO_BLOCKS, ADMISSION):
            return False
        held = head.num_blocks or len(view.probe(head).blocks)
        missing = -(-head.num_tokens // view.block_size) - held
        return draft.blocks_left + sum(draft.blocks_freed_by(victim) for victim in victims) >= missing

    def _in_order(self, requests: Iterable[Request]) -> list[Request]:
        return sorted(requests, key=self._order.order)
