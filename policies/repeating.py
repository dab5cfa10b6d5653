"""Steps that the policy need not be asked for, since its last plan says what they are (`Plan.repeats`)."""

from __future__ import annotations

from policies.draft import NO_BLOCKS, TOKEN_BUDGET
from policies.plan import Plan, Step
from policies.replica_state import ReplicaState
from policies.request import Request

NextChunk = tuple[Request | None, int]
"""Who is prefilled in the next step beside every decode, and with how many tokens; or nobody, and 0."""
_NO_CHUNK: NextChunk = (None, 0)


class Repeating:
    """The last plan, and how often it may be taken again. What comes in from outside ends that (`stop`)."""

    __slots__ = ("_for_blocks", "_for_tokens", "_state", "left", "plan")

    def __init__(self, state: ReplicaState) -> None:
        self._state = state
        self.plan = Plan()
        self.left = 0
        self._for_tokens = self._for_blocks = False  # whether the first who waits does so for want of nothing else

    def begin(self, plan: Plan, step: Step) -> None:
        """The policy was asked: this is its plan, and the step that was made of it."""
        self.plan = plan
        self.left = plan.repeats - 1 if plan.repeats > 1 and _may_recur(plan, step) else 0
        state = self._state
        if state.num_on_their_way or (state.tier is not None and not state.tier.keeps_nothing):
            self.left = 0  # before each plan it is looked what is to be copied, and what is too old
        reason = plan.blocked[0][1] if plan.blocked else ""
        self._for_tokens, self._for_blocks = reason == TOKEN_BUDGET, reason == NO_BLOCKS
        if self._for_blocks and step.grown and not state.pool.num_unused:
            self.left = 0  # as in `has_blocks`

    def stop(self) -> None:
        """The next plan may be another one."""
        self.left = 0

    def somebody_ended(self) -> None:
        """There may be room for the first who waits, unless it waits for tokens, of which a chunk takes all."""
        if self._state.num_waiting and not self._for_tokens:
            self.left = 0

    def filled(self, key: bytes, depth: int) -> None:
        """A block with this key can be hit: if it is of the first who waits, that one needs a block less."""
        blocked = self.plan.blocked
        if blocked and depth < len(blocked[0][0]._keys) and blocked[0][0]._keys[depth] == key:
            self.left = 0

    def next_chunk(self) -> NextChunk | None:
        """What the next step has beside its decodes; None where that is for the policy to say."""
        state = self._state
        if not state.prefilling:
            return None if self._for_tokens else _NO_CHUNK
        if len(state.prefilling) > 1:
            return None
        (request,) = state.prefilling.values()
        rest = self.plan.chunk_budget - len(state.group.members) - len(state.loose)
        tokens = min(rest, request.num_pending_tokens)
        # Who was admitted before others may come before their decodes under some policies.
        if tokens < 1 or (self._for_tokens and tokens < rest) or next(reversed(state.running)) != request.id:
            return None
        return request, tokens

    def has_blocks(self, chunk: NextChunk) -> bool:
        """Whether there are blocks for every decode and this chunk."""
        state, (request, tokens) = self._state, chunk
        # What is evicted may be of the first who waits, which then begins with less and may need fewer.
        free, more = state.pool.num_unused if self._for_blocks else state.pool.num_free, 0
        if request is not None:
            more = max(0, state.blocks_of(request._computed + tokens) - len(request._blocks))
        return state.num_decoding + more <= free or len(state.decodes_that_need_a_block()) + more <= free


def _may_recur(plan: Plan, step: Step) -> bool:
    """Whether the step ran the decode group and did nothing else that a repetition of it would not do."""
    if not step.decode_all or step.wake_at is not None or len(step.chunks) != len(plan.chunks):
        return False
    if step.chunks and not plan.chunk_budget:
        return False
    return not (step.copies or step.preempted or step.resumed or step.dropped or step.refused)
