"""Repeated steps in which nothing changes but counts: nobody joins, leaves, ends or reaches a cap.

No policy hears of them, so only where none wants to. Each is timed as any other; what is left out is to make a plan, a
step, a report and a row of it. What is recorded of many of them is what they share, and what each has of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from policies.decoding import go_on
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
    chunk: tuple[Request, int] | None = None,
) -> tuple[int, Row | None]:
    """Take up to `most` steps from the one with this index on, as many as `time` has times for and as there are unused
    blocks for. With a `chunk`, each computes so many tokens of this request, which has the blocks. Returns how many;
    and of the last one, if it is open, the row that is to be recorded at its end (empty if nothing is recorded)."""
    group, pool, limits = state.group, state.pool, state.limits
    decodes, tokens = len(group.members), 0 if chunk is None else chunk[1]
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
        start = 0 if chunk is None else chunk[0]._computed
        # What a step leaves behind at its end are filled blocks that others may hit; where none are kept, nothing.
        shapes = growing(decodes, context, longest, start, tokens, padded, graph)
        times, is_open = time(shapes, asked, not limits.prefix_caching)
        if not times:
            break
        unused = _advance(state, times, index + taken, chunk)
        if recording is not None:
            longest_of: Sequence[int] = range(longest, longest + len(times))
            if chunk is not None:
                longest_of = [max(own, start + (i + 1) * tokens) for i, own in enumerate(longest_of)]
            first = next(growing(decodes, context, longest, start, tokens, padded, graph))
            clock = group.clock - len(times) + 1
            row = recording.coasted(index + taken, times, first, clock, unused, longest_of, chunk, is_open)
            last = row if is_open else None
        elif is_open:
            last = ()
        taken += len(times)
        if is_open or len(times) < asked:
            break
    return taken, last


def _advance(state: ReplicaState, times: Sequence[Times], index: int, chunk: tuple[Request, int] | None) -> list[int]:
    """The blocks and counts of these steps. Returns the unused blocks after each."""
    group, pool, size = state.group, state.pool, state.limits.block_size
    plain = not state.limits.prefix_caching and chunk is None
    unused = []
    for i, (planned, _, end, _) in enumerate(times):
        clock = group.clock
        for request in group.at_block_boundary():
            blocks = request._blocks
            if request._computed + clock >= len(blocks) * size:
                blocks.append(pool.allocate_one(planned))
        group.clock = clock + 1
        unused.append(pool.num_unused)
        if plain:
            continue
        if chunk is not None:
            go_on(state, *chunk, index + i, planned)
        if state.limits.prefix_caching:
            for request in group.at_block_boundary():
                depth = request.num_computed_tokens // size - 1
                if depth < len(request._keys):
                    state.register(request, depth, end)
    return unused
