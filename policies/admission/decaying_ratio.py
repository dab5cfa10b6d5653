from __future__ import annotations

from policies.draft import Draft
from policies.plan import Mode, Report
from policies.registry import register
from policies.request import Request, State


@register("admission", "decaying_ratio")
class DecayingRatio:
    """Let a request in if its cap fits beside a share of what the others may still need, learned from preemptions.

    With left = min(cap - output so far, `clip` tokens), a request fits if its tokens and its left are fewer than
    free tokens - ratio * sum of left of those that run - what else was admitted in this step, at its full left.
    The ratio starts at `start` (0.7) and falls by (1 - `floor`) * start / `decay_steps` (0.14; 600) in each step that
    ran without preemption, down to floor * start. A preemption that gives memory back sets it to
    min(1, (output so far + 20 * n) / (caps + 1)), summed over the n requests that go on running, as if each were to get
    20 tokens more. It is `start` again when nothing runs.

    Departures: free tokens are those of free blocks, so that a block's unfilled end is not counted. What is left of a
    prompt that is still being prefilled is counted too. SGLang decays in decode steps only; here a step may be both.
    Which request is retracted is the stack's `Preemption`, and one at a time as memory is short, where SGLang goes on
    until 20 more steps fit. Cost: O(running) a step in which somebody waits, and a preemption; O(1) an admission.
    Source: SGLang, `PrefillAdder`, `retract_decode` and the scheduler's `new_token_ratio`.
    """

    RETRACT_STEPS = 20

    def __init__(
        self, block_size: int, start: float = 0.7, floor: float = 0.14, decay_steps: int = 600, clip: int = 4096
    ) -> None:
        if not 0 < start <= 1 or not 0 <= floor <= 1:
            raise ValueError(f"start must be in (0, 1] and floor in [0, 1], not {start} and {floor}")
        if decay_steps < 1 or clip < 1:
            raise ValueError(f"decay_steps and clip must be at least 1, not {decay_steps} and {clip}")
        self._block_size = block_size
        self._start, self._least = start, start * floor
        self._decay = (start - self._least) / decay_steps
        self._clip = clip
        self._holders: dict[int, Request] = {}
        self._retracted = False  # since the last report
        self._draft: Draft | None = None
        self._counted = (0, 0, 0)  # how many this draft had preempted, given chunks to, and admitted
        self._given: dict[int, int] = {}  # the tokens of those chunks
        self._charged = 0.0
        self.ratio = start

    def allows(self, request: Request, first_blocks: int, all_blocks: int, draft: Draft) -> bool:
        self._charge(draft)
        free = draft.blocks_left * self._block_size - self._charged
        return all_blocks * self._block_size + self._left(request) < free

    def on_admit(self, request: Request) -> None:
        self._holders[request.id] = request

    def on_release(self, request: Request) -> None:
        self._holders.pop(request.id, None)
        if not self._holders:
            self.ratio = self._start
        elif request.state is State.WAITING:
            decoded = sum(r.num_output_tokens + self.RETRACT_STEPS for r in self._holders.values())
            self.ratio = min(1.0, decoded / (sum(r.max_tokens for r in self._holders.values()) + 1))
            self._retracted = True

    def on_report(self, report: Report) -> None:
        # With a step in flight, that one's report comes first after a retraction, then that of the step with it.
        with_it = any(mode is not Mode.KEEP for _, mode in report.step.preempted)
        if self._holders and not self._retracted and not with_it:
            self.ratio = max(self._least, self.ratio - self._decay)
        self._retracted = False

    def _left(self, request: Request) -> int:
        return min(request.max_tokens - request.num_output_tokens, self._clip)

    def _charge(self, draft: Draft) -> None:
        """What is spoken for beyond the blocks that are taken, as far as this draft has got."""
        preempted, chunks, admitted = self._counted
        anew = draft is not self._draft or len(draft.preempted) != preempted
        if anew:
            self._given, chunks, admitted = {}, 0, 0
        self._given.update((request.id, tokens) for request, tokens in draft.plan.chunks[chunks:])
        if anew:
            stay = [r for r in draft.view.running.values() if r.id not in draft.preempted]
            self._charged = sum(self.ratio * self._left(r) for r in stay)
            self._charged += sum(self._rest(r) for r in stay if r.num_pending_tokens > 1)
        for request in draft.admitted[admitted:]:
            self._charged += self._left(request) + self._rest(request)
        self._draft, self._counted = draft, (len(draft.preempted), len(draft.plan.chunks), len(draft.admitted))

    def _rest(self, request: Request) -> int:
        """Tokens of a prompt that there are no blocks for yet."""
        computed = request.num_computed_tokens + self._given.get(request.id, 0)
        return max(0, request.num_tokens - max(computed, request.num_blocks * self._block_size))
