"""Repeated steps in which nothing changes but counts: nobody joins, leaves, ends or reaches a cap.

No policy hears of them, so only where none wants to. Each is timed as any other; what is left out is to make a plan, a
step, a report and a row of it. What is recorded of many of them is what they share, and what each has of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from policies.recording import Recording
from policies.records import Times
from policies.replica_state import ReplicaState
from policies.shapes import StepShape, decodes_alone, padded_batch

Timed = Callable[[StepShape, int], Sequence[Times]]
"""Given the shape of the first of so many steps at most, of which each has one token more of every decode: the times of
as many as can be taken now."""


def coast(state: ReplicaState, recording: Recording | None, index: int, most: int, time: Timed) -> int:
    """Take up to `most` steps from the one with this index on, as many as `time` has times for and as there are unused
    blocks for. Returns how many."""
    group, pool = state.group, state.pool
    decodes, size = len(group.members), state.limits.block_size
    padded, graph = padded_batch(decodes, 0, 0, state.limits.capture_sizes)
    taken = 0
    while taken < most:
        # Nobody opens more than one block in so many steps.
        safe = pool.num_unused // decodes * size
        if not safe and len(state.decodes_that_need_a_block()) <= pool.num_unused:
            safe = 1  # else one is evicted, or somebody preempted
        asked = min(safe, most - taken)
        shape = decodes_alone(decodes, group.context + decodes, group.longest + 1, padded, graph)
        times = time(shape, asked) if asked else ()
        if not times:
            break
        unused = _advance(state, times)
        if recording is not None:
            recording.coasted(index + taken, times, shape, group.clock - len(times) + 1, unused)
        taken += len(times)
        if len(times) < asked:
            break
    return taken


def _advance(state: ReplicaState, times: Sequence[Times]) -> list[int]:
    """The blocks and counts of these steps. Returns the unused blocks after each."""
    group, pool, size = state.group, state.pool, state.limits.block_size
    caches, unused = state.limits.prefix_caching, []
    for planned, _, end, _ in times:
        for request in group.at_block_boundary():
            blocks = request._blocks
            if request._computed + group.clock >= len(blocks) * size:
                blocks.append(pool.allocate_one(planned))
        group.clock += 1
        if caches:
            for request in group.at_block_boundary():
                depth = request.num_computed_tokens // size - 1
                if depth < len(request._keys):
                    state.register(request, depth, end)
        unused.append(pool.num_unused)
    return unused
