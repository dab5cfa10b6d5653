from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from operator import itemgetter
from typing import Any

from policies.contract import Queue, RankedQueue, View
from policies.draft import Draft
from policies.plan import Mode, Plan, Report
from policies.queued import QueuedScheduler
from policies.registry import register
from policies.request import Request, State
from policies.victims import MODES, Taking


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
    prefill, as for a waiting request. One that has got no token since it was started may then stop those without one
    that were admitted after it, the last first.
    So all requests end, whatever the order is and however it changes: each stop for a waiting request is paid with a
    token that the stopped one has got since, each one for a decode with the token that this gets now, and there are
    only so many tokens. While there are none, those without one stop only those admitted after them: the one admitted
    first is never stopped while others run, and alone it fits, so it gets to its token.

    `mode`: `recompute` frees a stopped request's blocks; `swap` moves them to host memory, and `cheapest` does what the
    cost model says is cheaper for each (both as in the rules for victims: `recompute` where the host has no room);
    `keep` leaves them to it while only slots are wanted, and recomputes where blocks are.
    Cost: O(prefills + decodes that open a block) while nobody lacks anything, else O(running log running), and some
    30 us for each who is stopped with the one who starts in its place: a plan that changes more than 30 takes over a
    millisecond, however many wait.
    """

    def __init__(self, queue: Queue, mode: str = "recompute", long_prefill_threshold: int = 0) -> None:
        super().__init__(queue)
        if not isinstance(queue, RankedQueue):
            raise ValueError(f"it needs a queue that orders running requests too; {type(queue).__name__} does not")
        if mode not in (*MODES, "keep"):
            raise ValueError(f"mode must be {', '.join(MODES)} or keep, not {mode!r}")
        if long_prefill_threshold < 0:
            raise ValueError(f"long_prefill_threshold must be 0 or more, not {long_prefill_threshold}")
        self._order: RankedQueue = queue
        self._keeps = mode == "keep"
        self._taking = Taking("recompute" if self._keeps else mode)
        self._max_chunk = long_prefill_threshold or None
        self._outputs: dict[int, int] = {}  # running request -> output tokens that it had when it was started last

    @property
    def needs_cost(self) -> bool:
        return self._taking.needs_cost or super().needs_cost

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
        draft = self._decode(line, draft, now)
        return self._prefill(line, draft, now).finish(steady=self.is_steady(Preemptive))

    # In the order

    def _decode(self, line: Line, draft: Draft, now: int) -> Draft:
        """A token for every decode, in the order as far as tokens go."""
        view, order = draft.view, self._order.order
        decodes, opening = None, view.decodes_that_need_a_block()
        if view.num_decoding > draft.tokens_left:
            decodes = sorted(view.decoding(), key=order)[: draft.tokens_left]
            opening = [request for request in opening if request in decodes]
        if len(opening) > draft.blocks_left:
            served: list[Request] = []
            for request in sorted(opening, key=order):
                if request.id not in draft.preempted:
                    served.append(request)
                    draft = self._make_room(line, draft, request, served)
        if decodes is None:
            draft.run_decodes(now)
        else:
            for request in decodes:
                if request.id not in draft.preempted:
                    draft.run(request, 1)
        return draft

    def _make_room(self, line: Line, draft: Draft, request: Request, served: list[Request]) -> Draft:
        """Stop others until each of those served, this request the last, can have a block; or it, if that is vain."""

        def fits(trial: Draft) -> bool:
            return trial.blocks_left >= sum(r.id not in trial.preempted for r in served)

        enough = self._stop(draft, self._victims(line, draft, request), fits)
        if enough is None:
            self._take(draft, request)
        return enough or draft

    def _prefill(self, line: Line, draft: Draft, now: int) -> Draft:
        """Prompt tokens for partial prefills and waiting requests."""
        begun = sorted(draft.view.prefilling.values(), key=self._order.order, reverse=True)
        admits = not draft.plan.preempt
        while draft.tokens_left > 0:
            head = self.queue.peek(now) if admits else None
            if begun and (head is None or self._order.order(begun[-1]) < self._order.order(head)):
                request, stopped = begun.pop(), len(draft.plan.preempt)
                if request.id not in draft.preempted:
                    draft = self._continue(line, draft, request)
                    admits = admits and len(draft.plan.preempt) == stopped
            elif head is None:
                return draft
            else:
                started = self._admit(line, draft, head)
                admits = started is not None
                if started is not None:
                    draft = started
                    self.queue.pop(now)
                    self._outputs[head.id] = head.num_output_tokens
        return draft

    def _continue(self, line: Line, draft: Draft, request: Request) -> Draft:
        """The next chunk of a prefill. If nobody can be stopped for it, it is stopped itself.

        Not if somebody has been admitted before it: that one may have taken the blocks, and can be stopped next time.
        """
        tokens = min(request.num_pending_tokens, draft.tokens_left, self._max_chunk or draft.tokens_left)
        blocks = draft.blocks_needed(request, tokens)
        enough = self._stop(draft, self._victims(line, draft, request), lambda trial: trial.blocks_left >= blocks)
        if enough is not None:
            enough.run(request, tokens)
        elif not draft.admitted:
            self._take(draft, request)
        return enough or draft

    def _admit(self, line: Line, draft: Draft, head: Request) -> Draft | None:
        """Start a waiting request, with others stopped for it; None if that is vain."""
        if draft.admit(head, max_chunk=self._max_chunk):
            return draft
        if not draft.view.settled(head):
            return None
        victims = self._stoppable(line, draft, head)
        if draft.seqs_left < 1:
            runs = (r for r in self._stoppable(line, draft, head) if r.state is State.RUNNING)
            victim = next((r for r in runs if r.id not in draft.preempted), None)
            if victim is None:
                return None
            draft = draft.copy()
            if self._keeps:
                draft.preempt(victim, Mode.KEEP)
            else:
                self._take(draft, victim)
                victims = (other for other in victims if other is not victim)
            if draft.admit(head, max_chunk=self._max_chunk):
                return self._started(draft, head)
        enough = self._stop_until(draft, victims, lambda trial: trial.admit(head, max_chunk=self._max_chunk))
        return None if enough is None else self._started(enough, head)

    @staticmethod
    def _started(draft: Draft, head: Request) -> Draft:
        """Without what it says of the tries before."""
        draft.plan.blocked = [blocked for blocked in draft.plan.blocked if blocked[0] is not head]
        return draft

    # Who is stopped

    def _take(self, draft: Draft, victim: Request) -> None:
        """Stop one, and take its blocks."""
        draft.preempt(victim, self._taking.mode_for(victim, draft.view, draft))

    def _stop(self, draft: Draft, victims: Iterator[Request], fits: Callable[[Draft], bool]) -> Draft | None:
        """The draft with as many stopped as it takes for something to fit, if any; None if all are not enough."""
        return draft if fits(draft) else self._stop_until(draft, victims, fits)

    def _stop_until(self, draft: Draft, victims: Iterator[Request], fits: Callable[[Draft], bool]) -> Draft | None:
        """The same where it is known not to fit as it is."""
        trial, stopped = draft.copy(), dict[int, Request]()
        for victim in victims:
            if victim.id not in stopped:
                stopped[victim.id] = victim
                self._take(trial, victim)
                if fits(trial):
                    break
        else:
            return None
        for victim in stopped.values():
            if victim.state is State.PAUSED:
                self.queue.remove(victim)
        return trial

    def _stoppable(self, line: Line, draft: Draft, head: Request) -> Iterator[Request]:
        """Whom a waiting request may stop, the first to go first."""
        for request in line.behind(draft, head):
            if request.state is State.PAUSED or (self._got_token(request) and self._order.preemptible(request)):
                yield request

    def _victims(self, line: Line, draft: Draft, request: Request) -> Iterator[Request]:
        """Whom one that runs may stop, the first to go first; some may come twice."""
        decodes = request.num_pending_tokens == 1
        yield from line.behind(draft, request) if decodes else self._stoppable(line, draft, request)
        if not self._got_token(request):
            for other in reversed(list(draft.view.running.values())):
                if other is request:
                    return
                if not self._got_token(other) and other.id not in draft.preempted:
                    yield other

    def _got_token(self, request: Request) -> bool:
        """Since it was started last."""
        return request.num_output_tokens > self._outputs.get(request.id, -1)


class Line:
    """Who runs or is paused, in the queue's order; put in order when first asked for."""

    def __init__(self, queue: RankedQueue, view: View) -> None:
        self._queue = queue
        self._view = view
        self._entries: list[tuple[tuple[Any, ...], Request]] | None = None
        self._start = 0  # before it everybody's memory is taken

    def behind(self, draft: Draft, request: Request) -> Iterator[Request]:
        """Those behind a request whose memory the draft does not take yet, the last first. No trial that may be
        given up again, as what one draft takes all later ones take."""
        if self._entries is None:
            order_of, held = self._queue.order, (*self._view.running.values(), *self._view.paused.values())
            self._entries = sorted([(order_of(r), r) for r in held], key=itemgetter(0), reverse=True)
        entries, taken = self._entries, draft.taken
        while self._start < len(entries) and entries[self._start][1].id in taken:
            self._start += 1
        place = self._queue.order(request)
        for order, other in islice(entries, self._start, None):
            if order <= place:
                return
            # One whose cap is reached only waits for its last report.
            if other.id not in taken and other.num_output_tokens < other.max_tokens:
                yield other
