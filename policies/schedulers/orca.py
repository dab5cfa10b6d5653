from __future__ import annotations

from policies.contract import Queue, View
from policies.draft import Draft
from policies.plan import Plan
from policies.queued import QueuedScheduler
from policies.registry import register


@register("scheduler", "orca")
class Orca(QueuedScheduler):
    """Orca: iteration-level scheduling. Everybody who runs gets a token, and whole prompts join them in the same step.

    (1) every running decode; (2) waiting requests from the head of the queue, each with all of its prompt and blocks
    for it, up to the first that does not fit. No chunks: a long prompt stretches the step, and so everybody's time
    between tokens. Admission is the stack's: Orca's own is `reserve_max` (the paper's and vLLM's "Orca (Max)"), with
    `reserve_pow2` and `reserve_oracle` as its variants; with `full_prompt` it is paged.

    Where this departs: Orca has no token budget, a replica here has. A prompt that does not fit beside what the step
    has already waits for the next step; one at the head that the decodes alone leave no room for takes what they leave,
    step by step, with blocks for all of it from the first, so that nobody starves. The paper's pipelining (several
    batches in flight) is not modelled.
    Cost: O(admissions + decodes that open a block); O(running) in a step short of blocks.
    Source: Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models", OSDI 2022,
    algorithm 1.
    """

    def __init__(self, queue: Queue) -> None:
        super().__init__(queue)

    def plan(self, view: View, now: int) -> Plan:
        draft = self.start(view, now)
        draft.run_decodes(now)
        partial = [request for request in view.prefilling.values() if request.id not in draft.preempted]
        for request in partial:
            tokens = min(request.num_pending_tokens, draft.tokens_left)
            if tokens and request.id not in draft.preempted:
                draft.run_or_preempt(request, tokens, now)  # blocks it has, unless another scheduler has admitted it
        if not draft.preempted:
            self._admit(draft, now, first_may_be_cut=not partial)
        return self.finish(draft, Orca, chunk_budget=view.max_num_batched_tokens)

    def _admit(self, draft: Draft, now: int, *, first_may_be_cut: bool) -> None:
        head = self.queue.peek(now)
        if head is None:
            return
        if first_may_be_cut and draft.tokens_left:
            if not draft.admit(head, hold=head.num_tokens):
                return
            self.queue.pop(now)
        self.admit_from_queue(draft, now, whole=True, hold_all=True)
