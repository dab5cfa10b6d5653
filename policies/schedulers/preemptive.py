from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

from policies.contract import Queue, RankedQueue, View
from policies.draft import Draft
from policies.plan import Mode, Plan, Report
from policies.queued import QueuedScheduler
from policies.registry import register
from policies.request import Request, State

Victims = Callable[[Draft, Request], list[Request]]
"""Who may be stopped for a request, the first to go at the end."""


@register("scheduler", "preemptive")
class Preemptive(QueuedScheduler):
    """Whoever is first in the queue's order runs, if need be in the place of those behind who run already.

    The order is one over all requests, running or not: `srpt`, `las`, `mlfq`, `edf`, ... are queues for it. First every
    running decode gets its token; then prompt tokens are handed out in the order, to partial prefills and to waiting
    requests alike. Who lacks a slot or memory gets it from those behind, the last first; if all that may be stopped are
    not enough, none is. Then a waiting request waits, and nobody overtakes it; one that runs is stopped itself, or
    stands still if somebody was admitted before it in this plan. Once one that runs has stopped somebody, nobody is
    admitted any more. The stack's rule for victims is not asked.

    Who may be stopped: for a waiting request, those behind who are paused, and those whom the queue lets be stopped
    (`preemptible`) and who have got a token since they were started last; for a decode, everybody behind; for a
    prefill, as for a waiting request, and then the prefills that were admitted after it, the last first.
    So all requests end, whatever the order is and however it changes: each stop for a waiting request is paid with a
    token that the stopped one has got since, each one for a decode with the token that this gets now, and there are
    only so many tokens. While there are none, nobody decodes, and prefills stop only those admitted after them: the
    one admitted first is never stopped while others run, and alone it fits, so it gets to its token.

    `mode`: `recompute` frees a stopped request's blocks; `keep` leaves them to it while only slots are wanted.
    Cost: O(prefills + decodes that open a block) while nobody lacks anything, else O(running log running).
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
        self._for_slot = Mode.KEEP if mode == "keep" else Mode.RECOMPUTE
        self._for_blocks = Mode.RECOMPUTE
        self._max_chunk = long_prefill_threshold or None
        self._outputs: dict[int, int] = {}  # running request -> output tokens that it had when it was started last

    def add(self, request: Request, now: int) -> None:
        super().add(request, now)
        self._outputs.pop(request.id, None)

    def remove(self, request: Request, now: int) -> None:
        super().remove(request, now)
        self._outputs.pop(request.id, None)

    def on_report(self, report: Report) -> None:
        super().on_report(report)
        for request, _, _ in report.finished:
            self._outputs.pop(request.id, None)

    def plan(self, view: View, now: int) -> Plan:
        draft, line = self.start(view, now), Line(self._order, view)
        draft = self._decode(draft, line, now)
        return self._prefill(draft, line, now).finish()

    # In the order

    def _decode(self, draft: Draft, line: Line, now: int) -> Draft:
        """A token for every decode, in the order as far as tokens go."""
        view = draft.view
        opening = view.decodes_that_need_a_block()
        if view.num_decoding <= draft.tokens_left and len(opening) <= draft.blocks_left:
            draft.run_decodes(now)
            return draft
        for request in sorted(view.decoding(), key=self._order.order):
            if draft.tokens_left and request.id not in draft.preempted:
                draft = self._run(draft, request, 1, line.behind)
        return draft

    def _prefill(self, draft: Draft, line: Line, now: int) -> Draft:
        """Prompt tokens for partial prefills and waiting requests."""
        begun = sorted(draft.view.prefilling.values(), key=self._order.order, reverse=True)
        admits, victims = not draft.plan.preempt, partial(self._for_prefill, line)
        while draft.tokens_left > 0:
            head = self.queue.peek(now) if admits else None
            if begun and (head is None or self._order.order(begun[-1]) < self._order.order(head)):
                request, stopped = begun.pop(), len(draft.plan.preempt)
                if request.id not in draft.preempted:
                    tokens = min(request.num_pending_tokens, draft.tokens_left, self._max_chunk or draft.tokens_left)
                    draft = self._run(draft, request, tokens, victims)
                    admits = admits and len(draft.plan.preempt) == stopped
            elif head is None:
                return draft
            else:
                started = self._admit(draft, line, head)
                admits = started is not None
                if started is not None:
                    draft = started
                    self.queue.pop(now)
                    self._outputs[head.id] = head.num_output_tokens
        return draft

    def _run(self, draft: Draft, request: Request, tokens: int, victims: Victims) -> Draft:
        """Tokens for one that runs, with others stopped for its blocks; if they are not enough, it is stopped itself.

        Not if somebody has been admitted before it: that one may have taken the blocks, and can be stopped next time.
        """
        blocks = draft.blocks_needed(request, tokens)
        if blocks > draft.blocks_left:
            enough = self._stop(draft, victims(draft, request), lambda trial: trial.blocks_left >= blocks)
            if enough is None:
                if not draft.admitted:
                    draft.preempt(request, self._for_blocks)
                return draft
            draft = enough
        draft.run(request, tokens)
        return draft

    def _admit(self, draft: Draft, line: Line, head: Request) -> Draft | None:
        """Start a waiting request, with others stopped for it; None if that is vain."""
        if draft.admit(head, max_chunk=self._max_chunk):
            return draft
        if not draft.view.settled(head):
            return None
        victims = self._stoppable(line.behind(draft, head))
        if draft.seqs_left < 1:
            runs = [r for r in victims if r.state is State.RUNNING and r.id not in draft.preempted]
            if not runs:
                return None
            draft = draft.copy()
            draft.preempt(runs[-1], self._for_slot)
            if self._for_slot is not Mode.KEEP:
                victims.remove(runs[-1])
        started = self._stop(draft, victims, lambda trial: trial.admit(head, max_chunk=self._max_chunk))
        if started is not None:
            started.plan.blocked = [blocked for blocked in started.plan.blocked if blocked[0] is not head]
        return started

    # Who is stopped

    def _stop(self, draft: Draft, victims: list[Request], fits: Callable[[Draft], bool]) -> Draft | None:
        """The draft with as many stopped as something takes to fit, from the end of the list; None if all do not do."""
        trial, stopped = draft.copy(), []
        while not fits(trial):
            if not victims:
                return None
            stopped.append(victims.pop())
            trial.preempt(stopped[-1], self._for_blocks)
        for request in stopped:
            if request.state is State.PAUSED:
                self.queue.remove(request)
        return trial

    def _stoppable(self, requests: list[Request]) -> list[Request]:
        return [r for r in requests if r.state is State.PAUSED or (self._order.preemptible(r) and self._got_token(r))]

    def _got_token(self, request: Request) -> bool:
        return request.num_output_tokens > self._outputs.get(request.id, -1)

    def _for_prefill(self, line: Line, draft: Draft, request: Request) -> list[Request]:
        behind = self._stoppable(line.behind(draft, request))
        prefills = list(draft.view.prefilling.values())
        later = prefills[prefills.index(request) + 1 :]
        return [r for r in later if r.id not in draft.preempted and r not in behind] + behind


class Line:
    """Who runs or is paused, in the queue's order; put in order when first asked for."""

    def __init__(self, queue: RankedQueue, view: View) -> None:
        self._queue = queue
        self._view = view
        self._entries: list[tuple[tuple[Any, ...], Request]] | None = None

    def behind(self, draft: Draft, request: Request) -> list[Request]:
        """Those behind a request whose memory the draft does not take yet, the last at the end."""
        if self._entries is None:
            held = (*self._view.running.values(), *self._view.paused.values())
            alive = (r for r in held if r.num_output_tokens < r.max_tokens)  # others only wait for their last report
            self._entries = sorted(((self._queue.order(r), r) for r in alive), key=itemgetter(0))
        taken = {request.id for request, mode in draft.plan.preempt if mode is not Mode.KEEP}
        start = bisect_right(self._entries, self._queue.order(request), key=itemgetter(0))
        return [request for _, request in self._entries[start:] if request.id not in taken]
