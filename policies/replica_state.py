"""One replica's requests and memory: the state behind the view, and the few moves it can make.

A running request is in exactly one of four places:

    prefilling   more than one token to compute
    loose        one token to compute; joins the decode group with the next step that runs everyone
    group        one token to compute, counted by the group's clock
    drained      its cap is reached by a step in flight; it only waits for the report
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from policies.block_pool import BlockPool, num_blocks
from policies.contract import CostModel, Hit
from policies.decode_group import DecodeGroup
from policies.disk_tier import DiskTier
from policies.draft import Draft
from policies.host_pool import HostPool
from policies.host_tier import HostTier
from policies.plan import BlockCopy
from policies.request import Request, State
from policies.stack import PolicyStack


@dataclass(frozen=True, slots=True)
class Limits:
    """What one replica can hold and run. Both panels must be given the same.

    `plan_lead_ns`: with `lag=1`, while a step with chunks runs, the next one is planned when that is expected to end
    within so long, so that what arrives meanwhile can be in it; None: at once, as while decodes alone run.
    `num_host_blocks`: blocks of host memory, for requests that are preempted with `Mode.SWAP` and for cached prefixes
    as the stack's offload policy says; 0: there is no such tier.
    `num_disk_blocks`: blocks on disk, for cached prefixes that host memory has no more room for; 0: no such tier.
    `disk_read_ns`, `disk_write_ns`: what a block takes there, for who decides whether to read it, and for a simulation.
    `disk_folder`: where the blocks lie; a simulation needs none.
    """

    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 4096
    prefix_caching: bool = True
    capture_sizes: tuple[int, ...] = ()
    mixed_capture_sizes: tuple[int, ...] = ()
    lag: int = 0
    plan_lead_ns: int | None = None
    num_host_blocks: int = 0
    num_disk_blocks: int = 0
    disk_read_ns: int = 0
    disk_write_ns: int = 0
    disk_folder: str = ""

    @property
    def max_total_tokens(self) -> int:
        """The longest sequence, prompt and output, that can be served."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.lag not in (0, 1):
            raise ValueError(f"lag must be 0 or 1, not {self.lag}")
        if self.plan_lead_ns is not None and self.plan_lead_ns < 0:
            raise ValueError(f"plan_lead_ns must be at least 0, not {self.plan_lead_ns}")
        for name in ("num_host_blocks", "num_disk_blocks", "disk_read_ns", "disk_write_ns"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.num_disk_blocks and not (self.num_host_blocks and self.prefix_caching):
            raise ValueError(
                "num_disk_blocks needs num_host_blocks and prefix_caching: blocks reach the disk by the host"
            )
        for name in ("capture_sizes", "mixed_capture_sizes"):
            if list(getattr(self, name)) != sorted(set(getattr(self, name))):
                raise ValueError(f"{name} must ascend, not {getattr(self, name)}")


_NO_HIT = Hit()


class ReplicaState:
    """Implements `policies.contract.View`; its other methods are the control plane's alone."""

    def __init__(self, limits: Limits, stack: PolicyStack, cost: CostModel | None) -> None:
        self.limits = limits
        self.stack = stack
        self.cost = cost
        self.pool = BlockPool(limits.num_blocks, stack.eviction if limits.prefix_caching else None)
        self.host = HostPool(limits.num_host_blocks)
        self.tier: HostTier | None = None  # of cached prefixes
        if limits.num_host_blocks and limits.prefix_caching:
            self.tier = HostTier(self)
            self.pool.on_evict = self.tier.evicted
        self.disk = DiskTier(self) if limits.num_disk_blocks else None
        self.copies: list[BlockCopy] = []  # asked for, and not in a step that runs yet
        self.requests: dict[int, Request] = {}  # alive: waiting, running, paused or swapped
        self.running: dict[int, Request] = {}
        self.prefilling: dict[int, Request] = {}
        self.loose: dict[int, Request] = {}
        self.drained: dict[int, Request] = {}
        self.paused: dict[int, Request] = {}
        self.swapped: dict[int, Request] = {}
        self.group = DecodeGroup(limits.block_size)
        self.pins: dict[int, int] = {}  # request id -> until when its blocks outlive it
        self.pinned: dict[int, Request] = {}  # ended requests that still hold blocks
        self.leaving: dict[int, Request] = {}  # stopped, with blocks here: for another replica, or landed
        self.landed: dict[int, Request] = {}  # of those: to run here as soon as there is a slot
        self.coming: dict[int, Request] = {}  # of other replicas, with blocks reserved here
        self.reserved: dict[int, list[int]] = {}  # request id -> blocks that KV is on its way into, or out of
        self.left_group: list[Request] = []
        self.waiting_tokens = 0  # summed over the waiting requests
        self.num_named = self.named_blocks = 0  # prompts whose blocks were named since the last step that ran
        self.last_launched = -1
        self.last_reported = -1
        # The view's fixed sizes, at hand
        self.block_size, self.num_blocks, self.num_host_blocks = (
            limits.block_size,
            limits.num_blocks,
            limits.num_host_blocks,
        )
        self.max_num_seqs, self.max_num_batched_tokens = limits.max_num_seqs, limits.max_num_batched_tokens

    # The view

    @property
    def num_free_blocks(self) -> int:
        return self.pool.num_free

    @property
    def num_free_host_blocks(self) -> int:
        return self.host.num_free

    @property
    def fetches_ahead(self) -> bool:
        return self.tier is not None and self.tier.policy.fetches_ahead()

    @property
    def num_decoding(self) -> int:
        return len(self.group.members) + len(self.loose)

    @property
    def num_waiting(self) -> int:
        return len(self.requests) - len(self.running) - len(self.paused) - len(self.swapped)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens still to compute of the live requests that do not decode."""
        started = [*self.prefilling.values(), *self.paused.values(), *self.swapped.values()]
        return self.waiting_tokens + sum(r.num_pending_tokens for r in started)

    @property
    def num_outstanding_tokens(self) -> int:
        """Tokens still to compute of all live requests: 1 for one that decodes."""
        return self.num_prefill_tokens + self.num_decoding

    @property
    def num_on_their_way(self) -> int:
        """Blocks on their way between host memory and disk, or asked for."""
        return 0 if self.disk is None else self.disk.num_underway

    def draft(self) -> Draft:
        return Draft(self, self.stack.admission, self.stack.preemption)

    def decoding(self) -> Iterator[Request]:
        for request in self.running.values():
            if request._group is not None or request.id in self.loose:
                yield request

    def decodes_that_need_a_block(self) -> list[Request]:
        size, clock = self.block_size, self.group.clock
        boundary = self.group.at_block_boundary()
        needy = [r for r in boundary if r._computed + clock >= len(r._blocks) * size] if boundary else []
        if self.loose:
            needy += [r for r in self.loose.values() if r._computed >= len(r._blocks) * size]
        return needy

    def probe(self, request: Request) -> Hit:
        size, caches = self.limits.block_size, self.limits.prefix_caching
        if request.state is State.SWAPPED:
            full = request._computed // size
            return Hit(request._computed, tuple(self.pool.lookup(request._keys[:full])) if caches else ())
        if not caches:
            return _NO_HIT
        # The last token is always computed, since its logits are what the step is for.
        keys = request._keys[: (request.num_tokens - 1) // size]
        blocks = self.pool.lookup(keys)
        if self.tier is None or len(blocks) == len(keys):
            return Hit(len(blocks) * size, tuple(blocks))
        host = self.tier.lookup(keys, len(blocks))
        on_disk = 0 if self.disk is None else self.disk.num_awaited(request, keys, len(blocks))
        return Hit((len(blocks) + len(host)) * size, tuple(blocks), tuple(host), on_disk)

    def prefix_keys(self, request: Request) -> Sequence[bytes]:
        return request._keys[: request.num_prompt_tokens // self.limits.block_size]

    def settled(self, request: Request) -> bool:
        return request._busy_until <= self.last_reported

    def num_freed_by(self, request: Request, already: dict[int, int]) -> int:
        return self.pool.num_freed_by(request._blocks, already)

    # The moves

    def place(self, request: Request) -> None:
        """Put a running request that is not in the group where it belongs, after its counts have changed."""
        if request._tokens - request.num_prompt_tokens >= request.max_tokens:
            self.prefilling.pop(request.id, None)
            self.loose.pop(request.id, None)
            self.drained[request.id] = request
        elif request._tokens - request._computed == 1:
            self.prefilling.pop(request.id, None)
            self.loose[request.id] = request
        else:
            self.prefilling[request.id] = request

    def leave_group(self, request: Request) -> None:
        self.group.leave(request)
        self.left_group.append(request)

    def stop(self, request: Request) -> None:
        """Take a request out of the running ones; it keeps its blocks."""
        request_id = request.id
        self.running.pop(request_id, None)
        if request._group is not None:
            self.leave_group(request)
        else:
            for place in (self.prefilling, self.loose, self.drained, self.paused, self.swapped):
                place.pop(request_id, None)
        request._busy_until = self.last_launched

    def free(self, request: Request, now: int) -> None:
        """Give a request's blocks back."""
        self.pool.release(request._blocks, now)
        request._blocks = []
        request._num_registered = 0

    def swap_out(self, request: Request, now: int) -> None:
        """Move what a stopped request has computed to the host, which has room for it; its blocks are given back."""
        used = self.blocks_of(request.num_computed_tokens)
        request._host_blocks = self.host.allocate(used)
        self.copies.append(BlockCopy(request, True, tuple(request._blocks[:used]), tuple(request._host_blocks)))
        self.free(request, now)

    def swap_in(self, request: Request, hit: Hit, now: int) -> None:
        """Bring a request's blocks back, beside those that it has claimed as its `hit`."""
        cached = len(hit.blocks)
        fresh = self.pool.allocate(len(request._host_blocks) - cached, now)
        if fresh:
            self.copies.append(BlockCopy(request, False, tuple(fresh), tuple(request._host_blocks[cached:])))
        request._blocks = [*(block.id for block in hit.blocks), *fresh]
        request._num_registered = cached
        self.forget_swapped(request)

    def forget_swapped(self, request: Request) -> None:
        """Give a request's host blocks back."""
        self.host.release(request._host_blocks)
        request._host_blocks = []

    def blocks_of(self, num_tokens: int) -> int:
        """How many blocks so many tokens take."""
        return num_blocks(num_tokens, self.limits.block_size)

    def grow(self, request: Request, num_tokens: int, now: int) -> bool:
        """Have blocks for `num_tokens` tokens in all. False if nothing had to be added."""
        missing = self.blocks_of(num_tokens) - len(request._blocks)
        if missing <= 0:
            return False
        request._blocks.extend(self.pool.allocate(missing, now))
        return True

    def register_full_blocks(self, request: Request, now: int) -> None:
        """Enter the request's full blocks whose keys are known in the prefix index."""
        full = min(request.num_computed_tokens // self.limits.block_size, len(request._keys))
        for depth in range(request._num_registered, full):
            self.register(request, depth, now)

    def register(self, request: Request, depth: int, now: int) -> None:
        """Enter one full block of the request in the prefix index."""
        keys = request._keys
        parent = keys[depth - 1] if depth else None
        block = self.pool.register(request._blocks[depth], keys[depth], depth, now, parent, request)
        request._num_registered = max(request._num_registered, depth + 1)
        if self.tier is not None and block is not None:
            self.tier.filled(block, now)

    def lift_pins(self, now: int) -> None:
        """Free what ended requests held until now."""
        for request_id in [i for i, until in self.pins.items() if until <= now]:
            del self.pins[request_id]
            request = self.pinned.pop(request_id, None)
            if request is not None:
                self.free(request, now)

    def check(self) -> None:
        """Raise AssertionError where blocks, requests or places are not conserved."""
        holders = [*self.requests.values(), *self.pinned.values(), *self.leaving.values()]
        self.pool.check([*(r._blocks for r in holders if r._blocks), *self.reserved.values()])
        assert not self.requests.keys() & self.leaving.keys(), "a request lives here and leaves"
        assert all(r.state is State.MOVING for r in self.leaving.values()), "a request leaves that does not move"
        assert self.landed.keys() <= self.leaving.keys(), "a request has landed that holds nothing"
        assert self.coming.keys() <= self.reserved.keys(), "a request comes for which nothing is reserved"
        self.host.check([r._host_blocks for r in self.requests.values()], self.num_on_their_way)
        if self.disk is not None:
            self.disk.check()
        places: list[Mapping[int, Request]] = [self.prefilling, self.loose, self.group.members, self.drained]
        assert sum(map(len, places)) == len(self.running), "a running request is in no place, or in two"
        for place in places:
            assert place.keys() <= self.running.keys(), "a request that does not run is among those that do"
        assert len(self.running) <= self.limits.max_num_seqs, "more sequences run than there are slots"
        size, waiting = self.limits.block_size, 0
        for request in self.requests.values():
            state, computed = request.state, request.num_computed_tokens
            runs, paused, out = request.id in self.running, request.id in self.paused, request.id in self.swapped
            right = runs is (state is State.RUNNING) and paused is (state is State.PAUSED)
            right = right and out is (state is State.SWAPPED) and (runs or paused or out or state is State.WAITING)
            assert right, f"{request!r} is not where its state says"
            swapped = self.blocks_of(computed) if state is State.SWAPPED else 0
            assert len(request._host_blocks) == swapped, f"{request!r} holds {request.num_host_blocks} host blocks"
            assert computed <= (len(request._blocks) + swapped) * size, f"{request!r} lacks blocks"
            assert request.num_output_tokens <= request.max_tokens, f"{request!r} is past its cap"
            if state is State.WAITING or state is State.SWAPPED:
                assert not request._blocks, f"{request!r} waits and holds blocks"
            if state is State.WAITING:
                waiting += request.num_pending_tokens
        assert waiting == self.waiting_tokens, "the count of waiting tokens is wrong"
        computed = sum(r.num_computed_tokens for r in self.group.members.values())
        assert computed == self.group.context, "the decode group's sum of contexts is wrong"
        longest = max((r.num_computed_tokens for r in self.group.members.values()), default=0)
        assert longest == self.group.longest, "the decode group's longest member is wrong"
