"""A step of the decode group, and the shape of any step: what carrying out a plan comes to, once it is checked."""

from __future__ import annotations

from policies.host_tier import merged
from policies.plan import Chunk, Step
from policies.replica_state import ReplicaState
from policies.request import Request
from policies.shapes import StepShape, padded_batch


def run_decodes(state: ReplicaState, index: int, now: int, prefill: Request | None, num_tokens: int) -> Step:
    """Enact a plan that says `decode_all` and nothing else but so many tokens of a prefill, where tokens and blocks are
    known to suffice."""
    step = Step(index, now)
    for request in state.decodes_that_need_a_block():
        open_block(state, step, request, now)
    contexts = advance_group(state, step)
    if prefill is not None:
        run_chunk(state, step, prefill, num_tokens, now)
        if state.limits.prefix_caching:
            state.register_full_blocks(prefill, now)
    finish(state, step, contexts)
    return step


def run_chunk(state: ReplicaState, step: Step, request: Request, num_tokens: int, now: int, hold: int = 0) -> None:
    """Tokens of a prefill; `hold`: with blocks for so many of the sequence, if that is more. There are the blocks."""
    start = request._computed
    end = start + num_tokens
    if state.grow(request, end if end > hold else hold, now) and not (step.grown and step.grown[-1] is request):
        step.grown.append(request)
    samples = end == request._tokens
    request._computed = end
    request._busy_until = step.index
    if samples:
        request._tokens += 1
        request._token_steps.append(step.index)
    state.place(request)
    step.chunks.append(_new(Chunk, (request, start, num_tokens, samples)))


def go_on(state: ReplicaState, request: Request, tokens: int, index: int, now: int) -> None:
    """One chunk more of a prefill that has blocks for it, and that it does not end."""
    request._computed += tokens
    request._busy_until = index
    if state.limits.prefix_caching:
        state.register_full_blocks(request, now)


def open_block(state: ReplicaState, step: Step, request: Request, now: int) -> None:
    """One more block for a decode whose blocks are full."""
    request._blocks.append(state.pool.allocate_one(now))
    if not step.grown or step.grown[-1] is not request:
        step.grown.append(request)


def advance_group(state: ReplicaState, step: Step) -> list[int]:
    """One token for every member of the decode group, and for those that become one with this step: they have blocks
    for it. Returns the contexts of those that have run for the last time."""
    group = state.group
    contexts: list[int] = []
    if state.loose:
        for request in state.loose.values():
            group.join(request)
            step.joined.append(request)
        state.loose.clear()
    step.num_decodes = len(group.members)
    if not step.num_decodes:
        return contexts
    step.decode_all = True
    step.capped = group.advance()
    step.decode_clock = group.clock
    for request in step.capped:
        request._busy_until = step.index
        state.place(request)
        contexts.append(request._computed)
    if state.limits.prefix_caching:
        size = state.limits.block_size
        for request in [*group.at_block_boundary(), *(r for r in step.capped if r._computed % size == 0)]:
            note_filled(state, step, request)
    return contexts


def note_filled(state: ReplicaState, step: Step, request: Request) -> None:
    """The step fills a block of this request with generated tokens."""
    depth = request.num_computed_tokens // state.limits.block_size - 1
    step.filled.append((request, depth, request._blocks[depth]))


def finish(state: ReplicaState, step: Step, contexts: list[int]) -> None:
    """Give the step its shape, and note who has left. `contexts`: of the decodes that are in the group no more."""
    context = longest = 0
    if step.decode_all:
        context, longest = state.group.context, state.group.longest
    else:
        step.num_decodes = len(step.decodes)
    if contexts:
        context, longest = context + sum(contexts), max(longest, *contexts)
    if step.num_decodes or step.chunks:
        # A step that runs nothing is not reported: who left before it is named by the next that does.
        step.left, state.left_group = state.left_group, []
        state.last_launched = step.index
    out = back = 0
    if state.copies and step.runs:  # else they wait for the next one that does
        step.copies, state.copies = merged(state.copies), []
        size = state.limits.block_size
        out = size * sum(len(copy.device) for copy in step.copies if copy.out)
        back = size * sum(len(copy.device) for copy in step.copies if not copy.out)
    step.shape = _shape(state, step, context, longest, (out, back, *_of_names(state, step)))


def _shape(state: ReplicaState, step: Step, context: int, longest: int, rest: tuple[int, ...]) -> StepShape:
    """`rest`: the fields from `swapped_out` on."""
    limits, decodes, chunks = state.limits, step.num_decodes, step.chunks
    if not chunks:
        padded, graph = padded_batch(decodes, 0, 0, limits.capture_sizes)
        return _new(StepShape, (decodes, context, longest, 0, 0, 0, 0, 0, decodes, padded, graph, *rest))
    tokens = pairs = ends = squares = samples = 0
    for _, start, count, last in chunks:
        end = start + count
        tokens += count
        pairs += count * start
        ends += end
        squares += count * count
        samples += last
        if end > longest:
            longest = end
    padded, graph = padded_batch(decodes, len(chunks), tokens, limits.capture_sizes, limits.mixed_capture_sizes)
    pairs += (squares + tokens) // 2
    sizes = (tokens, pairs, ends, squares, decodes + samples, padded, graph, *rest)
    return _new(StepShape, (decodes, context, longest, len(chunks), *sizes))


def _of_names(state: ReplicaState, step: Step) -> tuple[int, int, int]:
    """Prompts that were named for this step, their blocks, and blocks looked up for who is admitted. A step that runs
    nothing leaves what was named to the next one that does."""
    if not state.limits.prefix_caching or not step.runs:
        return 0, 0, 0
    named, blocks = state.num_named, state.named_blocks
    state.num_named = state.named_blocks = 0
    return named, blocks, sum(request.num_prompt_tokens // state.limits.block_size for request in step.admitted)


_new = tuple.__new__
"""Of a named tuple's fields: its constructor takes three times as long."""
