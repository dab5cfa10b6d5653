"""Repeated steps in which nothing changes but counts: nobody ends or reaches a cap, nor joins after the first of them.

No policy hears of them, so only where none wants to. Each is timed as any other; what is left out is to make a plan, a
step, a report and a row of it. What is recorded of many of them is what they share, and what each has of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from policies.decoding import go_on
from policies.plan import FOREVER
from policies.recording import Recording
from policies.records import Row, Times
from policies.replica_state import ReplicaState
from policies.request import Request
from policies.shapes import StepShape, growing, padded_batch

Timed = Callable[[Iterator[StepShape], int, bool], tuple[Sequence[Times], bool]]
"""Given the shapes of steps in a row: the times of as many as can be taken now, at most so many, and whether the last
one is open: its end is still to come. That may be only where the third argument says so."""


def coast(
    state: ReplicaState,
    recording: Recording | None,
    index: int,
    most: int,
    time: Timed,
    prefill: Request | None = None,
    tokens: int = 0,
) -> tuple[int, Row | None]:
    """Take up to `most` steps from the one with this index on, as many as `time` has times for and as there are unused
    blocks for; with a `prefill`, each computes so many `tokens` of this request, which has the blocks. Returns how many
    they are; and of the last one, if it is open, the row to be recorded at its end (empty if nothing is recorded)."""
    group, pool, limits = state.group, state.pool, state.limits
    decodes, loose = len(group.members) + len(state.loose), state.loose.values()
    sizes = (limits.capture_sizes, limits.mixed_capture_sizes)
    padded, graph = padded_batch(decodes, int(tokens > 0), tokens, *sizes)
    taken, last = 0, None
    while taken < most:
        # Nobody opens more than one block in so many steps.
        safe = pool.num_unused // decodes * limits.block_size
        if not safe and len(state.decodes_that_need_a_block()) <= pool.num_unused:
            safe = 1  # else one is evicted, or somebody preempted
        asked = min(safe, most - taken)
        if not asked:
            break
        context, longest = group.context + decodes, group.longest + 1
        for request in loose:  # who are with the group from the first step on
            context += request._computed
            longest = max(longest, request._computed + 1)
        start = 0 if prefill is None else prefill._computed
        # What a step leaves behind at its end are filled blocks that others may hit; where none are kept, nothing.
        shapes = growing(decodes, context, longest, start, tokens, padded, graph)
        times, is_open = time(shapes, asked, not limits.prefix_caching)
        if not times:
            break
        if loose or state.left_group:
            _regroup(state, recording, index + taken)
        unused = _advance(state, times, index + taken, prefill, tokens)
        if recording is not None:
            first = next(growing(decodes, context, longest, start, tokens, padded, graph))
            clock = group.clock - len(times) + 1
            row = recording.coasted(index + taken, times, first, clock, unused, longest, prefill, is_open)
            last = row if is_open else None
        elif is_open:
            last = ()
        taken += len(times)
        if is_open or len(times) < asked:
            break
    return taken, last


def _regroup(state: ReplicaState, recording: Recording | None, index: int) -> None:
    """With the step with this index, who is loose joins; of those who have left it is said."""
    if recording is not None:
        recording.regrouped(state.left_group, state.loose.values(), index)
    state.left_group = []
    for request in state.loose.values():
        state.group.join(request)
    state.loose.clear()


def chunks_that_go_on(state: ReplicaState, prefill: Request | None, tokens: int) -> int:
    """In how many steps so many tokens of this prefill can be computed that has the blocks for them and goes on
    afterwards, with two tokens at least: one alone is computed like a decode. No end of them without a prefill."""
    if prefill is None:
        return FOREVER
    within = len(prefill._blocks) * state.block_size - prefill._computed
    return max(0, min(within, prefill.num_pending_tokens - 2) // tokens)


def _advance(
    state: ReplicaState, times: Sequence[Times], index: int, prefill: Request | None, tokens: int
) -> list[int]:
    """The blocks and counts of these steps, for which there are unused blocks. Returns how many are left after each."""
    group, size, caching = state.group, state.block_size, state.limits.prefix_caching
    at_boundary, allocate = group.at_block_boundary, state.pool.allocate_one
    unused, left = [], state.pool.num_unused
    for i, (planned, _, end, _) in enumerate(times):
        clock = group.clock
        for request in at_boundary():
            blocks = request._blocks
            if request._computed + clock >= len(blocks) * size:
                blocks.append(allocate(planned))
                left -= 1
        group.clock = clock + 1
        unused.append(left)
        if prefill is not None:
            go_on(state, prefill, tokens, index + i, planned)
        if caching:
            for request in at_boundary():
                depth = request.num_computed_tokens // size - 1
                if depth < len(request._keys):
                    state.register(request, depth, end)
    return unused
