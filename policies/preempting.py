"""Taking memory from a request, and giving it back to one that was swapped out: parts of carrying out a plan."""

from __future__ import annotations

from policies.block_pool import num_idle
from policies.contract import Hit
from policies.draft import NO_HOST_BLOCKS
from policies.plan import Mode
from policies.replica_state import ReplicaState
from policies.request import Request, State


def objection_to_preempting(state: ReplicaState, request: Request, mode: Mode) -> str | None:
    """Why this cannot be done; None: it can."""
    modes = {State.PAUSED: (Mode.RECOMPUTE, Mode.SWAP), State.SWAPPED: (Mode.RECOMPUTE,)}.get(request.state, ())
    if request.id not in state.running and (state.requests.get(request.id) is not request or mode not in modes):
        return "not running"
    if mode is Mode.SWAP and not state.num_host_blocks:
        return "no host memory tier to swap to"
    if mode is Mode.SWAP and state.blocks_of(request.num_computed_tokens) > state.host.num_free:
        return NO_HOST_BLOCKS
    return None


def take_memory(state: ReplicaState, request: Request, mode: Mode, now: int) -> None:
    """Stop a request and do with its blocks as the mode says."""
    was_swapped = request.state is State.SWAPPED
    state.stop(request)
    if mode is Mode.KEEP:
        request.state = State.PAUSED
        state.paused[request.id] = request
        return
    if mode is Mode.SWAP:
        request.state = State.SWAPPED
        state.swapped[request.id] = request
        state.swap_out(request, now)
    else:
        request.state = State.WAITING
        request._computed = 0
        state.free(request, now)
        state.forget_swapped(request)
        state.waiting_tokens += request.num_pending_tokens
    if not was_swapped:  # else it has given back what it was promised
        state.stack.admission.on_release(request)


class Returns:
    """The swapped requests that a plan resumes. What they have on the device still is claimed at once; the blocks for
    the rest are only promised until every hit of the plan is claimed, so that none of those is evicted for them."""

    __slots__ = ("_state", "hits", "promised")

    def __init__(self, state: ReplicaState) -> None:
        self._state = state
        self.hits: dict[int, Hit] = {}
        self.promised = 0

    def promise(self, request: Request, now: int) -> bool:
        """Set blocks aside for it; False, with nothing changed, where there are not so many."""
        pool, hit = self._state.pool, self._state.probe(request)
        missing = request.num_host_blocks - len(hit.blocks)
        if missing + num_idle(hit.blocks) > pool.num_free - self.promised:
            return False
        if hit.blocks:
            pool.claim(hit.blocks, now, request)
        self.hits[request.id] = hit
        self.promised += missing
        return True

    def leaves_room(self, hit: Hit) -> bool:
        """Whether somebody else can claim this beside what is promised."""
        return not self.promised or num_idle(hit.blocks) <= self._state.pool.num_free - self.promised

    def bring_back(self, now: int) -> list[Request]:
        """Give out what was promised. Returns who has a new block table."""
        returned = self.requests
        for request in returned:
            self._state.swap_in(request, self.hits[request.id], now)
        self.promised = 0
        return returned

    @property
    def requests(self) -> list[Request]:
        return [self._state.requests[request_id] for request_id in self.hits]
