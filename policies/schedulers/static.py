from __future__ import annotations

from policies.contract import Queue, View
from policies.draft import Draft
from policies.plan import FOREVER, Plan
from policies.queued import QueuedScheduler
from policies.registry import register
from policies.request import Request


@register("scheduler", "static")
class Static(QueuedScheduler):
    """Static batching (FasterTransformer): a batch is formed, runs until its last member ends, then the next is formed.

    A batch takes requests from the head of the queue while there are slots (`max_batch_size`) and room for prompt and
    cap of each (contiguous allocation of the most it can need). All prompts are prefilled before anybody decodes; a
    prompt set beyond the token budget takes several prefill-only steps. A member that ends early gives up its place in
    the step but not its memory: that is freed when the last one ends.

    `form_timeout_ms`: how long to wait for a full batch, from the arrival of the oldest waiting request.
    Cost: O(members) when a batch forms and ends, O(1) a decode step.
    Source: the baseline of Yu et al., "Orca", OSDI 2022, section 2; Vidur's `faster_transformer` scheduler.
    """

    def __init__(self, queue: Queue, max_batch_size: int = 8, form_timeout_ms: float = 0.0) -> None:
        super().__init__(queue)
        if max_batch_size < 1 or form_timeout_ms < 0:
            raise ValueError("max_batch_size must be at least 1 and form_timeout_ms at least 0")
        self._max_batch_size = max_batch_size
        self._timeout_ns = round(form_timeout_ms * 1e6)
        self._members: list[Request] = []
        self._arrivals: dict[int, int] = {}
        self._forming = False

    def add(self, request: Request, now: int) -> None:
        super().add(request, now)
        self._arrivals[request.id] = request.arrival_ns

    def remove(self, request: Request, now: int) -> None:
        super().remove(request, now)
        self._arrivals.pop(request.id, None)

    def plan(self, view: View, now: int) -> Plan:
        draft = self.start(view, now)
        if not view.running:
            self._end_batch(draft, now)
            wait_until = self._wait_until(now)
            if wait_until is not None:
                draft.wake_at(wait_until)
                return draft.finish()
            self._forming = True
        for request in view.prefilling.values():
            tokens = min(request.num_pending_tokens, draft.tokens_left)
            if tokens and request.id not in draft.preempted:
                draft.run_or_preempt(request, tokens, now)  # a member has its blocks; who ran before a swap may not
        if self._forming:
            self._form(draft, now)
        if draft.num_tokens == 0:
            draft.run_decodes(now)
        return draft.finish()

    def _end_batch(self, draft: Draft, now: int) -> None:
        for member in self._members:
            if member.state.ended:
                draft.lift_pin(member, now)
        self._members = []

    def _wait_until(self, now: int) -> int | None:
        """When to form a batch that is not full yet; None: now."""
        if not self._timeout_ns or not self._arrivals or len(self._arrivals) >= self._max_batch_size:
            return None
        due = min(self._arrivals.values()) + self._timeout_ns
        return due if due > now else None

    def _form(self, draft: Draft, now: int) -> None:
        while len(self._members) < self._max_batch_size and (request := self.queue.peek(now)) is not None:
            if draft.tokens_left == 0:
                return  # the rest of the batch joins in the next step
            if not draft.admit(request, hold=request.num_prompt_tokens + request.max_tokens):
                break
            self.queue.pop(now)
            self._arrivals.pop(request.id, None)
            if request not in self._members:  # it is a member already if its first plan was refused
                self._members.append(request)
            draft.plan.pin.append((request, FOREVER))
        self._forming = False
