"""A plan in the making: keeps the budgets while a scheduler hands out tokens, slots and blocks.

Schedulers are free to build a `Plan` by hand; with a draft they read like their papers' pseudo-code. The draft only
counts. What it promises, the control plane can enact, because it counts blocks the same way.
"""

from __future__ import annotations

from policies.contract import Admission, Preemption, View
from policies.plan import FOREVER, Mode, Plan
from policies.request import Request, State

NO_BLOCKS = "no blocks"
NO_HOST_BLOCKS = "no host blocks"
TOKEN_BUDGET = "token budget"
SLOTS = "slots"
ADMISSION = "admission"
IN_FLIGHT = "in flight"
ON_DISK = "on disk"


class Draft:
    """One step's plan and what is left of the step's budgets."""

    def __init__(self, view: View, admission: Admission, preemption: Preemption) -> None:
        self.view = view
        self.plan = Plan()
        self.admission = admission
        self.preemption = preemption
        self.tokens_left = view.max_num_batched_tokens
        self.num_tokens = 0  # planned so far
        self.seqs_left = view.max_num_seqs - len(view.running)
        self.blocks_left = view.num_free_blocks
        self.host_blocks_left = view.num_free_host_blocks
        self.admitted: list[Request] = []
        self.preempted: dict[int, Request] = {}  # those that run until this plan
        self.taken: dict[int, Request] = {}  # those whose blocks this plan takes, running or paused
        self._given: dict[int, tuple[int, int]] = {}  # running request -> (tokens, blocks) planned for it
        self._released: dict[int, int] = {}  # cached block -> references that this plan gives up, less those it takes

    def copy(self) -> Draft:
        """A draft to try something in: what is done to it leaves this one as it is."""
        other = Draft(self.view, self.admission, self.preemption)
        other.tokens_left, other.num_tokens, other.seqs_left = self.tokens_left, self.num_tokens, self.seqs_left
        other.blocks_left, other.host_blocks_left = self.blocks_left, self.host_blocks_left
        other.plan = self.plan.copy()
        other.admitted, other.preempted, other.taken = self.admitted[:], self.preempted.copy(), self.taken.copy()
        other._given, other._released = self._given.copy(), self._released.copy()
        return other

    # Running requests

    def run_everyone(self, max_chunk: int | None = None) -> bool:
        """Give each decode its token and each partial prefill the rest of its tokens (at most `max_chunk`).

        All or nothing: False, with nothing planned, where tokens or blocks do not suffice for all of them; then
        somebody has to choose. Costs the number of prefills and of decodes that open a block.
        """
        prefilling = self.view.prefilling.values()
        chunks = [(r, min(r.num_pending_tokens, max_chunk or r.num_pending_tokens)) for r in prefilling]
        tokens = self.view.num_decoding + sum(n for _, n in chunks)
        blocks = len(self.view.decodes_that_need_a_block()) + sum(self.blocks_needed(r, n) for r, n in chunks)
        if tokens > self.tokens_left or blocks > self.blocks_left:
            return False
        self.plan.decode_all = self.view.num_decoding > 0
        self.plan.chunks.extend(chunks)
        self._spend(tokens, blocks)
        return True

    def run_decodes(self, now: int) -> None:
        """Give each decode its token, in order of admission as far as tokens go; preempt where blocks are missing."""
        if self.run_all_decodes():
            return
        needy = self.view.decodes_that_need_a_block()
        opening = {request.id for request in needy}
        for request in list(self.view.decoding()):
            if request.id not in self.preempted and self.tokens_left:
                blocks = int(request.id in opening)
                if self._make_room(request, blocks, now):
                    self._give(request, 1, blocks)

    def run_all_decodes(self) -> bool:
        """Give each decode that this plan does not stop its token; all or nothing, and costs, as `run_everyone`."""
        decodes, needy = self.view.num_decoding, self.view.decodes_that_need_a_block()
        if self.preempted:
            decodes -= self._num_decodes_stopped()
            needy = [request for request in needy if request.id not in self.preempted]
        if decodes > self.tokens_left or len(needy) > self.blocks_left:
            return False
        self.plan.decode_all = decodes > 0
        self._spend(decodes, len(needy))
        return True

    def run(self, request: Request, num_tokens: int) -> None:
        """Give a running request tokens that the budgets are known to have (see `make_room`)."""
        self._give(request, num_tokens, self.blocks_needed(request, num_tokens))

    def make_room(self, request: Request, num_tokens: int, now: int) -> bool:
        """Preempt until `num_tokens` more tokens of this running request fit. False if that took it itself."""
        return self._make_room(request, self.blocks_needed(request, num_tokens), now)

    def run_or_preempt(self, request: Request, num_tokens: int, now: int) -> bool:
        """`make_room`, then `run`: whether the running request got its tokens."""
        blocks = self.blocks_needed(request, num_tokens)
        if not self._make_room(request, blocks, now):
            return False
        self._give(request, num_tokens, blocks)
        return True

    def _make_room(self, request: Request, blocks: int, now: int) -> bool:
        while blocks > self.blocks_left:
            choice = self.preemption.victim(self.view, self, now)
            if choice is None:
                return False
            self.preempt(*choice)
            if choice[0] is request:
                return False
        return True

    def _give(self, request: Request, num_tokens: int, blocks: int) -> None:
        self._given[request.id] = (num_tokens, blocks)
        self._spend(num_tokens, blocks)
        if request.num_pending_tokens == 1:
            self.plan.decodes.append(request)
        else:
            self.plan.chunks.append((request, num_tokens))

    def preempt(self, request: Request, mode: Mode) -> None:
        """Stop a running request, or take a paused or swapped one's blocks; what this plan had given it goes back.

        Of one that this plan stops already and lets keep its blocks, the blocks are taken too. `Mode.SWAP` where
        `can_swap` says no is refused by the control plane, as "no host blocks".
        """
        if request.id in self.preempted:
            self.plan.preempt = [(r, m) for r, m in self.plan.preempt if r is not request]
        self.plan.preempt.append((request, mode))
        if request.state is State.RUNNING and request.id not in self.preempted:
            self.preempted[request.id] = request
            self.seqs_left += 1
        if mode is not Mode.KEEP:
            self.taken[request.id] = request
            self.blocks_left += self.view.num_freed_by(request, self._released)
            self.host_blocks_left += request.num_host_blocks
        if mode is Mode.SWAP:
            self.host_blocks_left -= self._host_blocks_for(request)
        if request.id in self._given:
            tokens, blocks = self._given.pop(request.id)
            self._spend(-tokens, -blocks)
            self.plan.decodes = [r for r in self.plan.decodes if r is not request]
            self.plan.chunks = [(r, n) for r, n in self.plan.chunks if r is not request]

    def can_swap(self, request: Request) -> bool:
        """Whether host memory has room for what a running or paused request has computed."""
        return self._host_blocks_for(request) <= self.host_blocks_left

    def _host_blocks_for(self, request: Request) -> int:
        return -(-request.num_computed_tokens // self.view.block_size)

    def blocks_freed_by(self, request: Request) -> int:
        """Blocks that preempting it would make allocatable, beside what this plan frees already. O(its blocks)."""
        return self.view.num_freed_by(request, dict(self._released))

    def blocks_needed(self, request: Request, num_tokens: int) -> int:
        """New blocks for `num_tokens` more tokens of a request that holds its blocks."""
        tokens = request.num_computed_tokens + num_tokens
        return max(0, -(-tokens // self.view.block_size) - request.num_blocks)

    def lift_pin(self, request: Request, now: int) -> None:
        """Give back the blocks that an ended request still holds."""
        self.plan.pin.append((request, now))
        self.blocks_left += self.view.num_freed_by(request, self._released)

    def _spend(self, tokens: int, blocks: int) -> None:
        self.num_tokens += tokens
        self.tokens_left -= tokens
        self.blocks_left -= blocks

    # Waiting requests

    def drop(self, request: Request, reason: str) -> None:
        """End a request here, without further service. It has left the queue."""
        self.plan.drop.append((request, reason))

    def wake_at(self, time: int) -> None:
        """Ask for a plan at this time even if nothing happens until then; the earliest of all such times counts."""
        wake = self.plan.wake_at
        self.plan.wake_at = time if wake is None else min(wake, time)

    def admit(self, request: Request, *, max_chunk: int | None = None, whole: bool = False, hold: int = 0) -> bool:
        """Start or resume a waiting request with as many tokens as the budget has, or say in the record why not.

        One that hits blocks on disk has them read first, and waits.
        One that was swapped out needs device blocks for all that it has computed, as they come back together.
        `max_chunk`: at most so many; `whole`: all of its tokens or none; `hold`: have blocks for at least so many
        tokens of the sequence, not only for the chunk.
        """
        reason = self._admit(request, max_chunk, whole, hold)
        if reason is not None:
            self.plan.blocked.append((request, reason))
            if reason in (SLOTS, TOKEN_BUDGET) and request.state is State.WAITING and self.view.fetches_ahead:
                where = "disk" if self.view.probe(request).num_on_disk else "host"
                self.plan.fetch.append((request, where))
        return reason is None

    def _admit(self, request: Request, max_chunk: int | None, whole: bool, hold: int) -> str | None:
        if self.seqs_left < 1:
            return SLOTS
        if self.tokens_left < 1:
            return TOKEN_BUDGET
        if not self.view.settled(request):
            return IN_FLIGHT
        paused, swapped = request.state is State.PAUSED, request.state is State.SWAPPED
        hit = None if paused else self.view.probe(request)
        if hit is not None and hit.num_on_disk:
            self.plan.fetch.append((request, "disk"))
            return ON_DISK
        start = request.num_computed_tokens if hit is None else hit.num_tokens
        tokens = min(request.num_tokens - start, self.tokens_left)
        if whole and start + tokens < request.num_tokens:
            return TOKEN_BUDGET
        if max_chunk is not None:
            tokens = min(tokens, max_chunk)

        decodes = (paused or swapped) and request.num_pending_tokens == 1
        if decodes:
            hold = 0  # which goes with a chunk
        held = request.num_blocks if hit is None else len(hit.blocks)
        hits = () if hit is None else hit.blocks
        idle = sum(block.references == self._released.get(block.id, 0) for block in hits)  # free until this plan
        size = self.view.block_size
        first = max(0, -(-max(start + tokens, hold) // size) - held) + idle
        everything = max(first, -(-request.num_tokens // size) - held + idle)
        if first > self.blocks_left:
            return NO_BLOCKS
        alone = not self.admitted and len(self.view.running) == len(self.preempted)
        if not alone and not self.admission.allows(request, first, everything, self):
            return ADMISSION

        self._spend(tokens, first)
        self.seqs_left -= 1
        for block in hits:
            self._released[block.id] = self._released.get(block.id, 0) - 1
        self.admitted.append(request)
        if paused or swapped:
            self.plan.resume.append(request)
        if decodes:
            if not self.plan.decode_all:  # which includes it, once it is resumed
                self.plan.decodes.append(request)
        else:
            self.plan.chunks.append((request, tokens))
        if hold > start + tokens:
            self.plan.hold[request.id] = hold
        return None

    def finish(self, *, steady: bool = False, ordered: bool = False, chunk_budget: int = 0) -> Plan:
        """The plan. Single decodes that turn out to be everybody's are said in one word.

        `steady`: the scheduler says that, with everybody decoding and nobody else there, it only ever runs them all.
        `ordered`: that requests which wait change nothing about it as long as the first of them does not fit, and that
        they keep their order. `chunk_budget`: that to the one request that prefills, where it is the last one that was
        admitted, it gives what the decodes leave of so many tokens (0: that it does not).
        """
        plan, view = self.plan, self.view
        if plan.decodes and not plan.resume and len(plan.decodes) == view.num_decoding - self._num_decodes_stopped():
            plan.decodes = []
            plan.decode_all = True
        if steady and plan.decode_all and not (view.paused or view.swapped):
            alike = chunk_budget > 0 if plan.chunks else not view.prefilling
            if alike and (view.num_waiting == len(self.admitted) or (ordered and self._first_lacks_room())):
                plan.repeats, plan.chunk_budget = FOREVER, chunk_budget
        return plan

    def _first_lacks_room(self) -> bool:
        """Whether the first who waits lacks what there is no more of until somebody ends: slots, or blocks where no
        prefill begins; or of the token budget, of which a chunk that takes all that is left leaves nothing (while a
        budget may grow otherwise, and admission might change its mind)."""
        blocked = self.plan.blocked
        return len(blocked) == 1 and blocked[0][1] in (
            (SLOTS, TOKEN_BUDGET) if self.plan.chunks else (SLOTS, NO_BLOCKS)
        )

    def _num_decodes_stopped(self) -> int:
        stopped = self.preempted.values()
        return sum(r.num_pending_tokens == 1 and r.num_output_tokens < r.max_tokens for r in stopped)
