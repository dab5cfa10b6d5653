from __future__ import annotations

from policies.contract import Queue, View
from policies.draft import Draft
from policies.plan import Plan
from policies.queued import QueuedScheduler
from policies.registry import register


@register("scheduler", "sglang")
class SGLang(QueuedScheduler):
    """SGLang: a prefill batch where one can be formed, else a decode step; at most one prompt is cut at a time.

    A prefill batch goes on with the prompt that was cut last, then takes waiting requests from the head of the queue,
    up to `chunked_prefill_size` tokens in all; the last of them is cut to what is left. With `mixed_chunk` every
    running decode has its token in the same step, and prefill tokens come on top of those.

    Its other parts are policies of their own: `lpm` is its default queue, `decaying_ratio` its admission, and
    `fewest_output` says whom it retracts.

    `chunked_prefill_size`: prefill tokens a step; 0: all of the replica's budget. SGLang takes 2,048 to 8,192 by the
    card's memory.
    Cost: O(admissions + decodes that open a block); O(running) in a step short of blocks.
    Source: Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", NeurIPS 2024, and its
    code: `managers/scheduler.py`, `get_next_batch_to_run`; `managers/schedule_policy.py`, `PrefillAdder`.
    """

    def __init__(self, queue: Queue, chunked_prefill_size: int = 0, mixed_chunk: bool = False) -> None:
        super().__init__(queue)
        if chunked_prefill_size < 0:
            raise ValueError(f"chunked_prefill_size must be 0 or more, not {chunked_prefill_size}")
        self._chunk_size = chunked_prefill_size
        self._mixed = mixed_chunk

    def plan(self, view: View, now: int) -> Plan:
        draft = self.start(view, now)
        if self._mixed:
            draft.run_decodes(now)
        decode_tokens = draft.num_tokens
        self._prefill(view, draft, now)
        if draft.num_tokens == decode_tokens and not self._mixed:
            draft.tokens_left = view.max_num_batched_tokens
            draft.run_decodes(now)
        return draft.finish(steady=self.is_steady(SGLang))

    def _prefill(self, view: View, draft: Draft, now: int) -> None:
        if self._chunk_size:
            draft.tokens_left = min(draft.tokens_left, self._chunk_size)
        for request in view.prefilling.values():
            tokens = min(request.num_pending_tokens, draft.tokens_left)
            if tokens and request.id not in draft.preempted:
                draft.run_or_preempt(request, tokens, now)
        if not draft.preempted:
            self.admit_from_queue(draft, now)
