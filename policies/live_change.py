"""Putting other policy objects into a replica that is running, without losing a request or a cached block.

A new object hears the events that make its books right, in a total order, and sees the rest in the view:

scheduler    `add` for every request that waits or is paused, by (arrival, id); those that run are in `View.running`
admission    `on_admit` for every request that holds memory, those that run first, in order of admission
preemption   nothing: it only chooses
eviction     `on_idle` for every idle block, in the order in which the old object would have let them go
offload      nothing: what is in host memory stays there
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policies.contract import Admission, Eviction, Scheduler
from policies.replica_state import ReplicaState

CHANGEABLE = ("scheduler", "admission", "preemption", "eviction", "offload")
"""The roles of one replica's stack. A queue sits inside its scheduler and is replaced with it."""


def change(state: ReplicaState, policies: Mapping[str, Any], now: int) -> None:
    """Replace the objects of these roles. If a new one raises while it hears its events, nothing is replaced.

    Raises ValueError for a role that a replica does not have, and for a policy that needs a cost model where there is
    none.
    """
    unknown = [role for role in policies if role not in CHANGEABLE]
    if unknown:
        raise ValueError(f"a replica has no {unknown[0]} to change; it has {', '.join(CHANGEABLE)}")
    for policy in policies.values():
        if getattr(policy, "needs_cost", False) and state.cost is None:
            raise ValueError(f"{type(policy).__name__} plans by what steps cost, and this replica has no cost model")
    if "scheduler" in policies:
        _teach_scheduler(state, policies["scheduler"], now)
    if "admission" in policies:
        _teach_admission(state, policies["admission"])
    if "eviction" in policies and state.pool.eviction is not None:
        _move_idle_blocks(state, policies["eviction"], now)
    for role, policy in policies.items():
        setattr(state.stack, role, policy)
    if "scheduler" in policies:
        # The old scheduler's pins would hold memory that the new one knows nothing of.
        state.pins.update(dict.fromkeys(state.pins, now))
        state.lift_pins(now)


def _teach_scheduler(state: ReplicaState, scheduler: Scheduler, now: int) -> None:
    waiting = [request for request in state.requests.values() if request.id not in state.running]
    for request in sorted(waiting, key=lambda request: request.key):
        scheduler.add(request, now)


def _teach_admission(state: ReplicaState, admission: Admission) -> None:
    holders = (state.running, state.paused, state.leaving, state.coming)
    for request in (request for place in holders for request in place.values()):
        admission.on_admit(request)


def _move_idle_blocks(state: ReplicaState, eviction: Eviction, now: int) -> None:
    pool = state.pool
    assert pool.eviction is not None
    idle = [pool.eviction.pop_victim(now) for _ in range(pool.num_idle)]
    try:
        for block in idle:
            eviction.on_idle(block, now)
    except BaseException:
        for block in idle:
            pool.eviction.on_idle(block, now)
        raise
    pool.eviction = eviction
