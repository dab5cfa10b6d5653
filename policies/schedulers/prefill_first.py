from __future__ import annotations

from policies.contract import Queue, View
from policies.draft import Draft
from policies.plan import Plan
from policies.queued import QueuedScheduler
from policies.registry import register


@register("scheduler", "prefill_first")
class PrefillFirst(QueuedScheduler):
    """vLLM v0: a step prefills or decodes, never both, and prefills come first.

    If waiting requests fit (tokens, slots, memory), the step is theirs alone: whole prompts, from the head of the
    queue. Otherwise every running request decodes; short of blocks, somebody is preempted.

    Where this departs: v0 wants a token budget as large as the longest prompt. Here a prompt beyond the budget is
    prefilled in prefill-only steps of one chunk each, with blocks for all of it from the first.
    Cost: O(admissions + decodes that open a block); O(running) in a step short of blocks.
    Source: Kwon et al., SOSP 2023, sections 4.5 and 5; vLLM v0.4, `core/scheduler.py`, `_schedule_default`.
    """

    def __init__(self, queue: Queue) -> None:
        super().__init__(queue)

    def plan(self, view: View, now: int) -> Plan:
        draft = self.start(view, now)
        for request in view.prefilling.values():  # a prompt beyond the budget, being continued
            tokens = min(request.num_pending_tokens, draft.tokens_left)
            if tokens and request.id not in draft.preempted:
                draft.run_or_preempt(request, tokens, now)  # blocks it has, unless another scheduler has admitted it
        if draft.num_tokens == 0 and not draft.preempted:
            self._admit_whole_prompts(view, draft, now)
        if draft.num_tokens == 0:
            draft.run_decodes(now)
        return self.finish(draft, PrefillFirst)

    def _admit_whole_prompts(self, view: View, draft: Draft, now: int) -> None:
        head = self.queue.peek(now)
        if head is None:
            return
        beyond = head.num_tokens - view.probe(head).num_tokens > view.max_num_batched_tokens
        if not beyond:
            self.admit_from_queue(draft, now, whole=True)
        elif draft.admit(head, hold=head.num_tokens):
            self.queue.pop(now)
