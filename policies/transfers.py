"""KV cache that moves between replicas: one replica's part in it.

A request with its KV goes from one replica to another in these calls, between plans. Until the KV has arrived both hold
blocks for it:

    source                                          target
    export     it stops, with its blocks
                                                    reserve    blocks for all of its tokens, or not now
               --- the panel moves the KV ---
    hand_over  it gives its blocks back
                                                    take_in    it runs here from now on
    take_back  it runs here after all               unreserve

It runs without having been in the target's queue, as after a change of schedulers, so that nobody who waits there for
memory can stand in the way of those that hold it. While there is no slot it waits for one (`let_run`).

Cached blocks go from one replica's prefix cache to another's in these:

    lend       hold them                            borrow     blocks to put them in, or not now
               --- the panel moves the KV ---
    end_loan                                        end_loan   they are in the prefix cache, or not
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from policies.block_pool import num_idle
from policies.replica_state import ReplicaState
from policies.request import Request, State

if TYPE_CHECKING:
    from policies.control_plane import ControlPlane


class Transfers:
    """What a control plane does for KV that comes or goes. No policy is asked but admission, by `reserve`."""

    def __init__(self, plane: ControlPlane, state: ReplicaState) -> None:
        self._plane = plane
        self._state = state

    @property
    def underway(self) -> bool:
        """Whether memory is held here for KV that comes or goes, so that something is still to come."""
        return bool(self._state.leaving or self._state.reserved)

    @property
    def receiving(self) -> bool:
        """Whether blocks are held here into which KV is on its way, or out of which."""
        return bool(self._state.reserved)

    @property
    def num_incoming_blocks(self) -> int:
        """Blocks of requests whose KV is on its way here, or here and without a slot to run in."""
        state = self._state
        waiting = sum(request.num_blocks for request in state.landed.values())
        return waiting + sum(len(state.reserved[request_id]) for request_id in state.coming)

    # A request that leaves

    def export(self, request: Request, now: int) -> bool:
        """Stop a request for another replica. False if it does not decode here (or wait for that, paused).

        What a step in flight computes for it is only known with that step's report (`View.settled`), which may still
        end it here.
        """
        state = self._state
        held = request.state in (State.RUNNING, State.PAUSED) and state.requests.get(request.id) is request
        done = request.num_output_tokens >= request.max_tokens and not request.hands_off
        if not held or done or request.num_pending_tokens != 1:
            return False
        self._touch(now)
        # Who may decode with the group does not know its last step; the others do.
        knows = request.state is State.PAUSED or request.id in state.drained
        last_step = request._busy_until if knows else state.last_launched
        state.stop(request)
        request._busy_until = last_step
        request.state = State.MOVING
        state.pins.pop(request.id, None)
        state.stack.scheduler.remove(request, now)
        del state.requests[request.id]
        state.leaving[request.id] = request
        self._record("export", request.id, request.num_computed_tokens)
        recording, next_step = self._plane._recording, self._plane.next_step
        before_step = -1 if recording is None else recording.left(request)
        stay = (self._plane.replica, before_step, next_step, len(request._token_steps), len(request._decode_runs))
        request._moves += stay
        self._plane._verify()
        return True

    def hand_over(self, request: Request, now: int) -> None:
        """Its KV is on the other replica: free its blocks here."""
        self._touch(now)
        state = self._state
        del state.leaving[request.id]
        state.free(request, now)
        state.stack.admission.on_release(request)
        self._record("hand_over", request.id)
        self._plane._verify()

    def take_back(self, request: Request, now: int) -> None:
        """It goes on here after all."""
        self._touch(now)
        self._record("take_back", request.id, request.num_computed_tokens)
        self._land(request, now)

    # A request that comes

    def reserve(self, request: Request, now: int) -> int | None:
        """Blocks for all tokens of a request of another replica. Answers how many are to be moved: those that are not
        in the prefix cache. None if there is no room now, or admission says no (not asked where nobody holds memory).
        """
        state = self._state
        self._touch(now)
        full = request.num_computed_tokens // state.block_size
        hits = state.pool.lookup(request._keys[:full]) if state.limits.prefix_caching else []
        blocks = state.blocks_of(request.num_tokens) - len(hits)
        taken = blocks + num_idle(hits)
        if taken > state.num_free_blocks:
            return None
        alone = not (state.running or state.paused or state.coming)
        if not alone and not state.stack.admission.allows(request, taken, taken, state.draft()):
            return None
        if hits:
            state.pool.claim(hits, now, request)
        state.reserved[request.id] = [block.id for block in hits] + state.pool.allocate(blocks, now)
        state.coming[request.id] = request
        state.stack.admission.on_admit(request)
        to_move = state.blocks_of(request.num_computed_tokens) - len(hits)
        self._record("reserve", request.id, to_move)
        self._plane._verify()
        return to_move

    def reserve_more(self, request: Request, now: int) -> bool:
        """Blocks for what it has generated since. False, with nothing changed, if there is no room."""
        self._touch(now)
        state = self._state
        held = state.reserved[request.id]
        missing = max(0, state.blocks_of(request.num_tokens) - len(held))
        if missing > state.num_free_blocks:
            return False
        held += state.pool.allocate(missing, now)
        self._plane._verify()
        return True

    def unreserve(self, request: Request, now: int) -> None:
        """It does not come: free its blocks."""
        self._touch(now)
        state = self._state
        del state.coming[request.id]
        state.pool.release(state.reserved.pop(request.id), now)
        state.stack.admission.on_release(request)
        self._record("unreserve", request.id)
        self._plane._verify()

    def take_in(self, request: Request, now: int) -> None:
        """Its KV has arrived, and no other replica has it any more: it runs here from the next plan on."""
        self._touch(now)
        state = self._state
        del state.coming[request.id]
        request._blocks = state.reserved.pop(request.id)
        request._busy_until = -1
        if state.limits.prefix_caching:
            state.register_full_blocks(request, now)
        state.leaving[request.id] = request
        self._record("take_in", request.id, request.num_computed_tokens)
        self._land(request, now)

    def _land(self, request: Request, now: int) -> None:
        self._state.landed[request.id] = request
        request.max_tokens += request._tokens_elsewhere
        request._tokens_elsewhere = 0
        self.let_run(now)
        self._plane._verify()

    def let_run(self, now: int) -> None:
        """Have those run whose KV is here, as far as there are slots. Call it before a plan."""
        state = self._state
        while state.landed and len(state.running) < state.limits.max_num_seqs:
            request = state.landed.pop(next(iter(state.landed)))
            del state.leaving[request.id]
            request.state = State.RUNNING
            state.requests[request.id] = state.running[request.id] = request
            state.place(request)
            if self._plane._recording is not None:
                self._plane._recording.submitted(request, self._plane.next_step)

    # Cached blocks

    def lend(self, request: Request, keys: Sequence[bytes], now: int) -> int:
        """Hold the leading blocks of a chain that are cached here, for another replica. Answers how many those are."""
        self._touch(now)
        pool = self._state.pool
        blocks = pool.lookup(keys)
        if blocks:
            pool.claim(blocks, now, request)
            self._state.reserved[request.id] = [block.id for block in blocks]
            self._record("lend", request.id, len(blocks))
            self._plane._verify()
        return len(blocks)

    def borrow(self, request: Request, keys: Sequence[bytes], now: int) -> int:
        """Blocks for a whole chain. Answers how many of them are to be moved: those that are not cached here; 0 and
        nothing held if that is none, there is no room, or prefixes are not cached here."""
        self._touch(now)
        pool = self._state.pool
        if not self._state.limits.prefix_caching:
            return 0
        hits = pool.lookup(keys)
        missing = len(keys) - len(hits)
        if not missing or missing + num_idle(hits) > pool.num_free:
            return 0
        pool.claim(hits, now, request)
        self._state.reserved[request.id] = [block.id for block in hits] + pool.allocate(missing, now)
        self._record("borrow", request.id, missing)
        self._plane._verify()
        return missing

    def end_loan(self, request: Request, now: int, keys: Sequence[bytes] = ()) -> None:
        """Give up what `lend` or `borrow` holds. `keys`: of the chain that has arrived here."""
        self._touch(now)
        pool = self._state.pool
        held = self._state.reserved.pop(request.id)
        for depth, key in enumerate(keys):
            pool.register(held[depth], key, depth, now, keys[depth - 1] if depth else None, request)
        pool.release(held, now)
        self._plane._verify()

    def _touch(self, now: int) -> None:
        """Something comes in from outside."""
        self._plane._advance(now)
        self._plane.repeating.stop()

    def _record(self, kind: str, request_id: int, tokens: int = 0) -> None:
        self._plane._record_event(kind, tokens, "", request_id)
