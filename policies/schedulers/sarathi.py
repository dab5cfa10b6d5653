from __future__ import annotations

from policies.contract import Queue, View
from policies.plan import Plan
from policies.queued import QueuedScheduler
from policies.registry import register


@register("scheduler", "sarathi")
class Sarathi(QueuedScheduler):
    """Sarathi-Serve: stall-free batching. Decodes first, then prefill chunks in what the chunk budget has left.

    (1) every running decode; (2) running partial prefills, in order of admission, each min(left, chunk_size - tokens so
    far); (3) waiting requests by the same rule, each with blocks for its whole prompt at once. The budget counts
    decodes. Short of blocks, a decode preempts; no step starves a decode.

    `chunk_size`: tokens a step, 512 for strict latency objectives, 2048 for relaxed ones.
    Cost: O(prefills + decodes that open a block); O(running) in a step short of blocks.
    Source: Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024,
    algorithm 3. Like the published code, admission takes the prompt's blocks at once.
    """

    def __init__(self, queue: Queue, chunk_size: int = 512) -> None:
        super().__init__(queue)
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
        self._chunk_size = chunk_size

    def plan(self, view: View, now: int) -> Plan:
        draft = self.start(view, now)
        draft.run_decodes(now)
        # The chunk budget binds prefills only: more decodes than chunk_size all run, and no prefill beside them.
        draft.tokens_left = max(0, min(draft.tokens_left, self._chunk_size - draft.num_tokens))
        for request in view.prefilling.values():
            tokens = min(request.num_pending_tokens, draft.tokens_left)
            if request.id in draft.preempted or tokens == 0:
                continue
            if draft.blocks_needed(request, tokens) <= draft.blocks_left:
                draft.run(request, tokens)
            elif draft.num_tokens == 0:  # admitted by another scheduler, without blocks for all of its prompt
                draft.run_or_preempt(request, tokens, now)
        if not draft.preempted:
            self.admit_from_queue(draft, now, hold_all=True)
        return self.finish(draft, Sarathi, chunk_budget=min(self._chunk_size, view.max_num_batched_tokens))
