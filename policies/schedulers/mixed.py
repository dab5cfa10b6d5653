from __future__ import annotations

from policies.contract import Queue, View
from policies.plan import Plan
from policies.queued import QueuedScheduler
from policies.registry import register


@register("scheduler", "mixed")
class Mixed(QueuedScheduler):
    """vLLM v1: one token budget for decodes and prefill chunks alike.

    First the running requests in order of admission, each as many of its tokens as the budget has left; where blocks
    are missing, somebody is preempted, until they suffice. Then, only in a step that preempted nobody, waiting requests
    from the head of the queue, chunked to what the budget has left, up to the first that does not fit.

    `long_prefill_threshold`: at most so many tokens of one prompt in a step (0: no limit).
    Cost: O(prefills + decodes that open a block); O(running) in a step short of tokens or blocks.
    Source: vLLM 0.33, `v1/core/sched/scheduler.py`.
    """

    def __init__(self, queue: Queue, long_prefill_threshold: int = 0) -> None:
        super().__init__(queue)
        if long_prefill_threshold < 0:
            raise ValueError(f"long_prefill_threshold must be 0 or more, not {long_prefill_threshold}")
        self._max_chunk = long_prefill_threshold or None

    def plan(self, view: View, now: int) -> Plan:
        draft = self.start(view, now)
        # All at once where tokens and blocks suffice for everybody who runs; else nothing is planned yet.
        if not draft.run_everyone(self._max_chunk):
            for request in list(view.running.values()):
                # Its last token is in flight (under lag 1), or it gave its blocks to somebody before it.
                if request.id in draft.preempted or request.num_output_tokens >= request.max_tokens:
                    continue
                tokens = min(request.num_pending_tokens, draft.tokens_left)
                if self._max_chunk is not None:
                    tokens = min(tokens, self._max_chunk)
                if tokens > 0:
                    draft.run_or_preempt(request, tokens, now)
        if not draft.preempted:
            self.admit_from_queue(draft, now, max_chunk=self._max_chunk)
        # How often the plan may be repeated without asking; a subclass of Mixed, which may do more, is asked each time.
        return self.finish(draft, Mixed, chunk_budget=0 if self._max_chunk else view.max_num_batched_tokens)
