"""Carrying out a plan: check each item, change the replica's state, say what a panel has to run.

The order is fixed: pins, drops, preemptions, resumptions, prefix hits of all admissions (before anything is allocated,
so that no allocation of the plan evicts what another item of it hits), blocks for those that come back from the host,
decodes, chunks. An item that cannot be done is refused with a reason and leaves no trace; nothing is edited silently.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Final

from policies.block_pool import num_idle
from policies.contract import Hit
from policies.decoding import advance_group, finish, note_filled, open_block, run_chunk
from policies.draft import NO_BLOCKS, SLOTS, TOKEN_BUDGET
from policies.plan import Plan, Step
from policies.preempting import Returns, objection_to_preempting, take_memory
from policies.replica_state import ReplicaState
from policies.request import Request, State


class Enactment:
    """One plan on its way to a step. `back_to_queue`: requests that wait again, for the scheduler to take back."""

    __slots__ = (
        "_contexts",
        "_hits",
        "_hold",
        "_returns",
        "_seen",
        "_set_back",
        "_tokens_left",
        "now",
        "plan",
        "state",
        "step",
    )

    def __init__(self, state: ReplicaState, plan: Plan, index: int, now: int) -> None:
        self.state = state
        self.plan = plan
        self.now = now
        self.step = Step(index=index, plan_ns=now, wake_at=plan.wake_at)
        self._set_back: dict[int, Request] = {}
        self._tokens_left = state.limits.max_num_batched_tokens
        self._seen: set[int] = set()
        self._hits: dict[int, Hit] = {}
        self._returns = Returns(state) if plan.resume else _NOBODY_RETURNS
        self._contexts: list[int] = []
        self._hold: dict[int, int] = {}

    def run(self) -> Step:
        """Enact the whole plan."""
        state, plan = self.state, self.plan
        if plan.pin or state.pins:
            self._pin()
        if plan.drop:
            self._drop()
        if plan.preempt:
            self._preempt()
        if plan.resume:
            self._resume()
        chunks = self._claim_hits(self._bundled(self._whole(plan.chunks))) if plan.chunks else []
        if self._returns.hits:
            self.step.grown += self._returns.bring_back(now=self.now)
        self._decode()
        for request, num_tokens in chunks:
            self._chunk(request, num_tokens)
        if plan.fetch:
            self._fetch()
        if state.limits.prefix_caching:
            self._register()
        finish(state, self.step, self._contexts)
        return self.step

    @property
    def back_to_queue(self) -> list[Request]:
        """Those that were preempted or refused and did not get to run by another item of the plan: each once."""
        if not self._set_back:
            return []
        live, waits = self.state.requests, (State.WAITING, State.PAUSED, State.SWAPPED)
        return [r for r in self._set_back.values() if r.id in live and r.state in waits]

    def _refuse(self, request: Request, reason: str) -> None:
        self.step.refused.append((request, reason))
        self._set_back[request.id] = request

    # What does not compute

    def _pin(self) -> None:
        state = self.state
        for request, until in self.plan.pin:
            if request.id in state.requests or request.id in state.pinned:
                state.pins[request.id] = until
            else:
                self.step.refused.append((request, "holds no blocks any more"))
        state.lift_pins(self.now)

    def _drop(self) -> None:
        state = self.state
        for request, reason in self.plan.drop:
            if request.id not in state.requests:
                self._refuse(request, "not a live request")
            elif request.id in self._seen:
                self._refuse(request, "planned twice")
            else:
                self._seen.add(request.id)
                self.step.dropped.append((request, reason))
                if request.id in state.running:
                    state.stop(request)  # it takes no part in this step

    def _preempt(self) -> None:
        for request, mode in self.plan.preempt:
            reason = objection_to_preempting(self.state, request, mode)
            if reason is None and request.id in self._seen:
                reason = "planned twice"
            if reason is not None:
                self._refuse(request, reason)
                continue
            self._seen.add(request.id)
            take_memory(self.state, request, mode, self.now)
            request.num_preemptions += 1
            self.step.preempted.append((request, mode))
            self._set_back[request.id] = request

    def _resume(self) -> None:
        state = self.state
        for request in self.plan.resume:
            swapped = request.id in state.swapped
            if not (swapped or request.id in state.paused) or request.id in self._seen:
                self._refuse(request, "not paused")
            elif len(state.running) >= state.limits.max_num_seqs:
                self._refuse(request, SLOTS)
            elif not state.settled(request):
                self._refuse(request, "a step in flight still computes for it")
            elif swapped and not self._returns.promise(request, self.now):
                self._refuse(request, NO_BLOCKS)
            else:
                (state.swapped if swapped else state.paused).pop(request.id)
                self._start(request)
                self.step.resumed.append(request)
                if swapped:
                    state.stack.admission.on_admit(request)

    def _start(self, request: Request) -> None:
        request.state = State.RUNNING
        self.state.running[request.id] = request
        self.state.place(request)

    # Admissions

    def _whole(self, chunks: Sequence[tuple[Request, Any]]) -> list[tuple[Request, int]]:
        """The chunks without those of fractions; NumPy's integers are whole numbers too."""
        whole: list[tuple[Request, int]] = []
        holds: Mapping[int, Any] = self.plan.hold
        for request, num_tokens in chunks:
            hold = holds.get(request.id, 0)
            try:
                if hold != 0:
                    self._hold[request.id] = operator.index(hold)
                whole.append((request, operator.index(num_tokens)))
            except TypeError:
                self._refuse(request, f"{num_tokens!r} tokens, {hold!r} to hold: not whole numbers")
        return whole

    def _bundled(self, chunks: list[tuple[Request, int]]) -> list[tuple[Request, int]]:
        """The chunks without the bundles that do not fit whole beside everything else in the plan."""
        if not self.plan.bundles:
            return chunks
        state, plan = self.state, self.plan
        bundles: list[frozenset[int]] = []
        for bundle in plan.bundles:  # those that share a member are one
            for other in [b for b in bundles if b & bundle]:
                bundles.remove(other)
                bundle |= other
            bundles.append(bundle)
        bundled = frozenset().union(*bundles)
        size = state.limits.block_size
        opening = state.decodes_that_need_a_block() if plan.decode_all else plan.decodes
        opening = [r for r in opening if r.num_computed_tokens >= self._start_of(r)[1] * size]
        slots = state.limits.max_num_seqs - len(state.running)
        tokens = self._tokens_left - (state.num_decoding if plan.decode_all else len(plan.decodes))
        blocks = state.pool.num_free - self._returns.promised - len(opening)
        refused: set[int] = set()
        for bundle in [frozenset({r.id}) for r, _ in chunks if r.id not in bundled] + bundles:
            members = [(r, n) for r, n in chunks if r.id in bundle]
            new = sum(r.state is State.WAITING for r, _ in members)
            total = sum(n for _, n in members)
            need = sum(self._blocks_for(r, n) for r, n in members)
            fits = new <= slots and total <= tokens and need <= blocks and len(members) == len(bundle)
            if bundle <= bundled and not (fits and all(self._can_run(r, n) for r, n in members)):
                refused |= bundle
                for request, _ in members:
                    self._refuse(request, "its bundle does not fit")
            else:
                slots, blocks, tokens = slots - new, blocks - need, tokens - total
        return [(request, n) for request, n in chunks if request.id not in refused]

    def _can_run(self, request: Request, num_tokens: int) -> bool:
        start, _, _ = self._start_of(request)
        return self._objection(request) is None and 1 <= num_tokens <= request.num_tokens - start

    def _blocks_for(self, request: Request, num_tokens: int) -> int:
        """Allocatable blocks that a chunk takes, the idle ones of its prefix hit included."""
        start, held, idle = self._start_of(request)
        target = max(start + num_tokens, self._hold.get(request.id, 0))
        return max(0, -(-target // self.state.limits.block_size) - held) + idle

    def _start_of(self, request: Request) -> tuple[int, int, int]:
        """The position it goes on from, the blocks it has by then, and how many of them are idle until then."""
        if request.id in self._returns.hits:
            return request.num_computed_tokens, request.num_host_blocks, 0
        if request.state is not State.WAITING:
            return request.num_computed_tokens, request.num_blocks, 0
        hit = self.state.probe(request)
        return hit.num_tokens, len(hit.blocks), num_idle(hit.blocks)

    def _claim_hits(self, chunks: list[tuple[Request, int]]) -> list[tuple[Request, int]]:
        state = self.state
        probed = []
        for request, num_tokens in chunks:
            reason = self._objection(request)
            if reason is not None:
                self._refuse(request, reason)
                continue
            self._seen.add(request.id)
            probed.append((request, num_tokens))
            if request.state is State.WAITING:
                hit = state.probe(request)
                self._hits[request.id] = hit
        if not (state.limits.prefix_caching or self._returns.hits):  # then every hit is empty
            return probed
        for request_id, hit in list(self._hits.items()):
            request = state.requests[request_id]
            if not self._returns.leaves_room(hit):
                del self._hits[request_id]
                probed = [(other, n) for other, n in probed if other is not request]
                self._refuse(request, NO_BLOCKS)
                continue
            if hit.blocks:
                state.pool.claim(hit.blocks, self.now, request)
            if state.tier is not None:
                state.host.claim(hit.host)
                state.tier.hit(hit.blocks, self.now)
        return probed

    def _objection(self, request: Request) -> str | None:
        """Why a chunk of this request cannot even be tried."""
        state = self.state
        if request.id in self._seen:
            return "planned twice"
        if state.requests.get(request.id) is not request:
            return "not a live request"
        if request.state is State.PAUSED:
            return "paused and not resumed"
        if request.state is State.SWAPPED:
            return "swapped out and not resumed"
        if request.id in state.drained:
            return "nothing left to compute"
        if request.state is State.RUNNING and request.num_pending_tokens == 1:
            return "decodes: name it in decodes, or say decode_all"
        if request.state is State.WAITING and not state.settled(request):
            return "a step in flight still computes for it"
        return None

    # What computes

    def _decode(self) -> None:
        state, plan = self.state, self.plan
        for request in plan.decodes:
            if plan.decode_all:
                self._refuse(request, "planned twice")
            elif request.id not in state.running or request.num_pending_tokens != 1 or request.id in state.drained:
                self._refuse(request, "not a decode")
            elif request.id in self._seen:
                self._refuse(request, "planned twice")
            elif self._tokens_left < 1:
                self._refuse(request, TOKEN_BUDGET)
            elif not self._grow(request, request.num_computed_tokens + 1):
                self._refuse(request, NO_BLOCKS)
            else:
                self._seen.add(request.id)
                self._decode_one(request)
        if plan.decode_all:
            self._decode_group()

    def _decode_one(self, request: Request) -> None:
        state = self.state
        if request._group is not None:
            state.leave_group(request)
        request._computed += 1
        request._tokens += 1
        request._token_steps.append(self.step.index)
        request._busy_until = self.step.index
        state.place(request)
        self._tokens_left -= 1
        self.step.decodes.append(request)
        self._contexts.append(request._computed)
        if state.limits.prefix_caching and request._computed % state.limits.block_size == 0:
            note_filled(state, self.step, request)

    def _decode_group(self) -> None:
        state, step = self.state, self.step
        if state.num_decoding > self._tokens_left:
            for request in state.decoding():
                self._refuse(request, TOKEN_BUDGET)
            return
        without_block: list[Request] = []
        for request in state.decodes_that_need_a_block():
            if state.pool.num_free:
                open_block(state, step, request, self.now)
            else:
                self._refuse(request, NO_BLOCKS)
                without_block.append(request)
        for request in without_block:
            if request._group is not None:
                state.leave_group(request)
            state.loose.pop(request.id, None)  # it stands aside while the others advance
        self._contexts += advance_group(state, step)
        self._tokens_left -= step.num_decodes
        for request in without_block:
            state.place(request)

    def _chunk(self, request: Request, num_tokens: int) -> None:
        state = self.state
        waiting = request.state is State.WAITING
        start = self._hits[request.id].num_tokens if waiting else request.num_computed_tokens
        left = request.num_tokens - start
        if not 1 <= num_tokens <= left:
            return self._refuse_chunk(request, f"{num_tokens} tokens asked for, {left} left")
        if num_tokens > self._tokens_left:
            return self._refuse_chunk(request, TOKEN_BUDGET)
        if waiting and len(state.running) >= state.limits.max_num_seqs:
            return self._refuse_chunk(request, SLOTS)
        end = start + num_tokens
        target = max(end, self._hold[request.id]) if request.id in self._hold else end
        held = len(self._hits[request.id].blocks) if waiting else len(request._blocks)
        missing = -(-target // state.block_size) - held
        if missing > state.pool.num_free:
            return self._refuse_chunk(request, NO_BLOCKS)
        if waiting:
            self._admit(request)
        run_chunk(state, self.step, request, num_tokens, self.now, target)
        self._tokens_left -= num_tokens
        return None

    def _refuse_chunk(self, request: Request, reason: str) -> None:
        hit = self._hits.pop(request.id, None)
        if hit is not None and hit.blocks:
            self.state.pool.release([block.id for block in hit.blocks], self.now)
        if hit is not None and hit.host:
            self.state.host.unclaim(hit.host)
        self._refuse(request, reason)

    def _admit(self, request: Request) -> None:
        state, hit = self.state, self._hits.pop(request.id)
        state.waiting_tokens -= request.num_pending_tokens
        request._blocks = [block.id for block in hit.blocks]
        if hit.host:
            assert state.tier is not None
            request._blocks += state.tier.fetch(request, hit, self.now)
        request._computed = hit.num_tokens
        request._num_registered = len(hit.blocks)
        if request.first_scheduled_ns is None:
            request.first_scheduled_ns = self.now
            request.num_cached_tokens = hit.num_tokens
            request.num_fetched_tokens = len(hit.host) * state.limits.block_size
            reads = request._reads or ()
            request.num_disk_tokens = sum(block.key in reads for block in hit.host) * state.limits.block_size
        request._reads = None
        if hit.num_tokens:
            self.step.grown.append(request)
        self._start(request)
        self.step.admitted.append(request)
        state.stack.admission.on_admit(request)

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Blocks for `num_tokens` tokens; False, with nothing changed, if there are not enough."""
        state = self.state
        if -(-num_tokens // state.limits.block_size) - len(request._blocks) > state.pool.num_free:
            return False
        if state.grow(request, num_tokens, self.now) and (not self.step.grown or self.step.grown[-1] is not request):
            self.step.grown.append(request)
        return True

    def _fetch(self) -> None:
        """For requests that wait, into blocks that nobody holds. Nothing to fetch, or no room, is no matter."""
        state = self.state
        for request, where in self.plan.fetch:
            tier = {"host": state.tier, "disk": state.disk}.get(where)
            if tier is None:
                self.step.refused.append((request, "no tier to fetch from"))
            elif request.state is not State.WAITING or state.requests.get(request.id) is not request:
                self.step.refused.append((request, "not waiting"))
            else:
                tier.fetch_ahead(request, self.now)

    def _register(self) -> None:
        """Prompt blocks are named as soon as the step that computes them is on its way: steps run in order."""
        for request in [*self._returns.requests, *(chunk.request for chunk in self.step.chunks)]:
            self.state.register_full_blocks(request, self.now)


_NOBODY_RETURNS: Final = Returns(None)  # type: ignore[arg-type]
"""Of the many plans that resume nobody."""
