"""What schedulers with one queue of waiting requests have in common."""

from __future__ import annotations

from policies import registry
from policies.contract import Queue, View
from policies.draft import Draft
from policies.key_queue import KeyQueue
from policies.plan import Plan, Report
from policies.request import Request


class QueuedScheduler:
    """A scheduler's queue, fed by events, and admission from its head."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    @property
    def clairvoyant(self) -> bool:
        return registry.is_clairvoyant(self.queue)

    @property
    def needs_cost(self) -> bool:
        return getattr(self.queue, "needs_cost", False)

    def add(self, request: Request, now: int) -> None:
        self.queue.push(request, now)

    def remove(self, request: Request, now: int) -> None:
        self.queue.remove(request)

    def on_report(self, report: Report) -> None:
        self.queue.on_report(report)

    def is_steady(self, own: type) -> bool:
        """For `Draft.finish`: whether with nobody waiting it would plan alike again.

        Not where a subclass of `own`, which says so of itself, may do more, nor where the queue does something before
        each plan.
        """
        return type(self) is own and type(self.queue).begin is KeyQueue.begin

    @property
    def is_ordered(self) -> bool:
        """For `Draft.finish`: whether the queue's order depends on nothing but its requests."""
        queue = type(self.queue)
        return (queue.begin, queue.peek, queue.on_report) == (KeyQueue.begin, KeyQueue.peek, KeyQueue.on_report)

    def finish(self, draft: Draft, own: type, *, chunk_budget: int = 0) -> Plan:
        """The plan of a scheduler that is steady and ordered in as far as its queue is, and no subclass of `own`;
        `chunk_budget` as in `Draft.finish`."""
        if draft.preempted or (draft.plan.chunks and not chunk_budget):
            return draft.finish()
        return draft.finish(steady=self.is_steady(own), ordered=self.is_ordered, chunk_budget=chunk_budget)

    def start(self, view: View, now: int) -> Draft:
        """An empty plan, with the queue in order for this step."""
        draft = view.draft()
        self.queue.begin(draft, now)
        return draft

    def admit_from_queue(
        self,
        draft: Draft,
        now: int,
        *,
        max_chunk: int | None = None,
        whole: bool = False,
        hold_all: bool = False,
    ) -> None:
        """Admit from the head of the queue up to the first request that does not fit: nobody overtakes it.

        `whole`: no chunks, a prompt's tokens all in this step; `hold_all`: blocks for all of its tokens at once.
        """
        while (request := self.queue.peek(now)) is not None:
            hold = request.num_tokens if hold_all else 0
            if not draft.admit(request, max_chunk=max_chunk, whole=whole, hold=hold):
                return
            self.queue.pop(now)
