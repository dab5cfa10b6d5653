"""Repeated steps in which nothing changes but counts: nobody joins, leaves, ends or reaches a cap.

No policy hears of them, so only where none wants to. Each is timed and recorded as any other; what is left out is to
make a plan, a step and a report of it.
"""

from __future__ import annotations

from collections.abc import Callable

from policies.recording import Recording
from policies.replica_state import ReplicaState
from policies.shapes import StepShape, padded_batch

Times = tuple[int, int, int, int]
"""Of a step: planned, launched, ended, and for so long on the device."""


def coast(
    state: ReplicaState,
    recording: Recording | None,
    index: int,
    most: int,
    time: Callable[[StepShape], Times | None],
) -> int:
    """Take up to `most` steps from the one with this index on, each only if `time` has times for its shape and there
    are unused blocks for it. Returns how many."""
    group, pool, size = state.group, state.pool, state.limits.block_size
    num_decodes, context, longest = len(group.members), group.context, group.longest
    padded, graph = padded_batch(num_decodes, 0, 0, state.limits.capture_sizes)
    record = None if recording is None else recording.coasting()
    taken = 0
    while taken < most:
        needy = state.decodes_that_need_a_block()
        if len(needy) > pool.num_unused:  # one is evicted, or somebody preempted
            break
        shape = StepShape(
            num_decodes, context + num_decodes, longest + 1, 0, 0, 0, 0, 0, num_decodes, padded, graph, 0, 0
        )  # fmt: skip
        times = time(shape)
        if times is None:
            break
        for request in needy:
            request._blocks.append(pool.allocate_one(times[0]))
        group.clock += 1
        context, longest = shape.decode_context, shape.max_context
        if state.limits.prefix_caching:
            for request in group.at_block_boundary():
                depth = request.num_computed_tokens // size - 1
                if depth < len(request._keys):
                    state.register(request, depth, times[2])
        if record is not None:
            record(index + taken, times, shape, group.clock, pool.num_unused)
        taken += 1
    return taken
