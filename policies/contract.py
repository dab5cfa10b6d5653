"""The contract: the six roles of a policy stack, and what they see.

Rules (they make one object serve both panels):

1. Time is an argument, in integer nanoseconds since the run began. A policy never reads a clock.
2. Randomness comes from `policies.random_stream`, keyed by (seed, policy, request).
3. Every order is total: ties end in `Request.key`. No iteration over a set decides anything.
4. `plan` may move queues but charges nobody; accounting happens in `on_report`, from what really ran.
5. A policy sees a read-only view and never a request's true output length. One that must gets an oracle (or the block
   keys to come) by name and says `clairvoyant = True`. One that cannot plan without a cost model says
   `needs_cost = True`.
6. The control plane validates a plan; what it cannot do comes back as refused, with a reason.
7. Queues are indexed and fed by events. Sorting a waiting list every step is a defect.
8. A step costs what changed, not how many run: `Plan.decode_all` is one word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

from policies.plan import Mode, Plan, Report
from policies.request import Request
from policies.shapes import StepShape

if TYPE_CHECKING:
    from policies.block_pool import CachedBlock
    from policies.draft import Draft
    from policies.host_pool import HostBlock


class CostModel(Protocol):
    """What a step will cost, for policies that plan by it. Pure."""

    def step_ns(self, shape: StepShape) -> int:
        """Duration of a step of this shape, host and device, in nanoseconds."""
        ...


@dataclass(frozen=True, slots=True)
class Hit:
    """The part of a waiting request's tokens that need not be computed: their KV blocks are on the device (`blocks`),
    or behind those in host memory and worth fetching (`host`), for which it takes new blocks.

    Of a swapped request, `num_tokens` is what it has computed, which comes back; `blocks` are those that need no copy.
    """

    num_tokens: int = 0
    blocks: tuple[CachedBlock, ...] = ()
    host: tuple[HostBlock, ...] = ()
    num_on_disk: int = 0
    """Blocks that are not counted in `num_tokens`, but would be if one had them read from disk first."""


class View(Protocol):
    """One replica, read-only, valid inside the call it is handed to."""

    @property
    def block_size(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_free_blocks(self) -> int:
        """Blocks an allocation can have: free ones, and idle cached ones that would be evicted."""
        ...

    @property
    def num_host_blocks(self) -> int:
        """Blocks of host memory that preempted requests can be swapped to; 0 where there is no such tier."""
        ...

    @property
    def num_free_host_blocks(self) -> int: ...
    @property
    def fetches_ahead(self) -> bool:
        """Whether prefixes are kept in host memory, and the offload policy wants those of waiting requests fetched."""
        ...

    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_num_batched_tokens(self) -> int: ...
    @property
    def running(self) -> Mapping[int, Request]:
        """Running requests by id, in order of admission."""
        ...

    @property
    def prefilling(self) -> Mapping[int, Request]:
        """The running requests with more than one token to compute, in order of admission."""
        ...

    @property
    def paused(self) -> Mapping[int, Request]:
        """Requests that were preempted with `Mode.KEEP`, by id: they hold their blocks."""
        ...

    @property
    def swapped(self) -> Mapping[int, Request]:
        """Requests that were preempted with `Mode.SWAP`, by id: their blocks are in host memory."""
        ...

    @property
    def num_decoding(self) -> int:
        """Running requests with exactly one token to compute: those that `Plan.decode_all` runs."""
        ...

    @property
    def num_waiting(self) -> int: ...
    @property
    def cost(self) -> CostModel | None: ...
    def draft(self) -> Draft:
        """An empty plan with the full budgets of this step, and the stack's admission and preemption."""
        ...

    def decoding(self) -> Iterator[Request]:
        """The requests that `num_decoding` counts. Costs as many steps as there are."""
        ...

    def decodes_that_need_a_block(self) -> list[Request]:
        """Those of them whose next token opens a block. Costs only as many steps as it returns."""
        ...

    def probe(self, request: Request) -> Hit:
        """The prefix hit a waiting (or swapped) request would have now. No side effect on recency."""
        ...

    def prefix_keys(self, request: Request) -> Sequence[bytes]:
        """The names of its prompt's full blocks, in order: who has the same name has the same tokens up to there.
        None where prefixes are not cached."""
        ...

    def settled(self, request: Request) -> bool:
        """False while a step in flight still computes for a preempted request; it cannot be planned until then."""
        ...

    def num_freed_by(self, request: Request, already: dict[int, int]) -> int:
        """Blocks that preempting it would make allocatable; `already` carries shared blocks between calls."""
        ...


_Method = TypeVar("_Method", bound=Callable[..., None])


def does_nothing(on_report: _Method) -> _Method:
    """Decorates an `on_report` without effect, which a simulation need not call. A subclass's own is called again."""
    on_report.does_nothing = True  # type: ignore[attr-defined]
    return on_report


@runtime_checkable
class Scheduler(Protocol):
    """Who runs in the next step, and how many tokens each. Owns the queue of waiting requests."""

    def add(self, request: Request, now: int) -> None:
        """A request waits: it has arrived, was preempted, or a plan for it was refused."""
        ...

    def remove(self, request: Request, now: int) -> None:
        """A request is gone without a report that says so: cancelled (or stopped by its text) in whatever state, or
        ended while it waited after a preemption. It may not be in the queue."""
        ...

    def plan(self, view: View, now: int) -> Plan:
        """The next step. A waiting request that is named in the plan leaves the queue."""
        ...

    def on_report(self, report: Report) -> None:
        """What really ran. All charging happens here."""
        ...


@runtime_checkable
class Queue(Protocol):
    """The order of the waiting requests, inside a scheduler."""

    def push(self, request: Request, now: int) -> None: ...
    def peek(self, now: int) -> Request | None: ...
    def pop(self, now: int) -> Request:
        """Take what `peek` shows. Raises IndexError when empty."""
        ...

    def remove(self, request: Request) -> None: ...
    def begin(self, draft: Draft, now: int) -> None:
        """A step is about to be planned: the queue may look at the replica (`draft.view`) and put itself in order,
        shed requests of its own (`draft.drop`), and ask to be woken (`draft.wake_at`)."""
        ...

    def on_report(self, report: Report) -> None: ...


@runtime_checkable
class RankedQueue(Queue, Protocol):
    """A queue whose order extends to requests that run: what a scheduler needs that preempts by rank."""

    def order(self, request: Request) -> tuple[Any, ...]:
        """Its place among all requests, waiting or not; the smaller goes first. Ends in `Request.key`."""
        ...

    def preemptible(self, request: Request) -> bool:
        """Whether this running request may be stopped for one that is ahead of it."""
        ...


@runtime_checkable
class Admission(Protocol):
    """Whether a waiting request's memory may be promised.

    Asked only while something runs: a request alone on a replica is always let in, so that no rule can starve the
    queue for ever.
    """

    def allows(self, request: Request, first_blocks: int, all_blocks: int, draft: Draft) -> bool:
        """May it start? It takes `first_blocks` now, which `draft.blocks_left` has; `all_blocks` in the end for the
        tokens it has today (prompt, and output before a preemption)."""
        ...

    def on_admit(self, request: Request) -> None:
        """It runs now, for the first time or again after its memory was taken: commit what was promised."""
        ...

    def on_release(self, request: Request) -> None:
        """It gave its memory back: it was preempted (recomputed or swapped), or has ended (`request.state` says how,
        with its tokens)."""
        ...

    def on_report(self, report: Report) -> None:
        """What really ran, after `on_release` for those that ended with it."""
        ...


@runtime_checkable
class LengthPredictor(Protocol):
    """How many output tokens a request will have. Handed to the policies that ask for one; no role of a stack's own."""

    def predict(self, request: Request) -> float:
        """Output tokens in all, at least 1, as far as can be told now."""
        ...

    def on_end(self, request: Request, num_output_tokens: int) -> None:
        """A request has come to its end by itself: stopped, or at its cap."""
        ...


@runtime_checkable
class Preemption(Protocol):
    """Whom to take memory from, and how."""

    def victim(self, view: View, draft: Draft, now: int) -> tuple[Request, Mode] | None:
        """The next running request to preempt that `draft` does not preempt yet."""
        ...


@runtime_checkable
class Eviction(Protocol):
    """Which idle cached block goes next."""

    def on_idle(self, block: CachedBlock, now: int) -> None:
        """Nobody holds the block any more: it may be evicted from now on."""
        ...

    def on_hit(self, block: CachedBlock, now: int) -> None:
        """A request takes the block (it may have been idle or not)."""
        ...

    def pop_victim(self, now: int) -> CachedBlock:
        """Choose an idle block and forget it. Called only when there is one."""
        ...


@runtime_checkable
class Offload(Protocol):
    """Which cached prefix blocks get a copy in host memory, and whether such copies are fetched.

    Where there is a disk behind that, it is asked of the blocks of host memory too: `on_fill` of one that has got its
    content, `on_hit` of one that was fetched, `on_evict` of one that will be evicted before long; `fetches` then has a
    cost model whose copies from the host take the reading too.

    Asked only where there is host memory and prefixes are cached. One that never keeps a block says
    `keeps_nothing = True`.
    """

    def on_fill(self, block: CachedBlock, now: int) -> bool:
        """A block is full and in the prefix index: copy it with the next step?"""
        ...

    def on_hit(self, block: CachedBlock, now: int) -> bool:
        """An admitted request has taken a block (`block.hits` counts it): copy it with the next step?"""
        ...

    def on_evict(self, block: CachedBlock, now: int) -> bool:
        """The device evicts a block that has no copy: copy it before it is given out anew?"""
        ...

    def keeps_since(self, now: int) -> int | None:
        """Copies that were used last before this time are forgotten; None: none for their age. Asked before each plan;
        it never goes back."""
        ...

    def fetches_ahead(self) -> bool:
        """Whether a draft asks for the fetch of what a request hits that it cannot admit for want of a slot or of
        tokens (`Plan.fetch`), so that it is there when its turn comes."""
        ...

    def fetches(self, start: int, num_tokens: int, cost: CostModel | None) -> bool:
        """Whether to fetch `num_tokens` tokens from position `start` on rather than compute them. Pure: asked whenever
        somebody looks for a hit."""
        ...


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes: its replica, and where they differ the one that decodes, and the one from whose prefix
    cache the blocks are fetched that its own lacks. Only simulations move KV so far; a router that does says
    `moves_kv = True`."""

    replica: int
    decode_replica: int | None = None
    kv_from: int | None = None


LATER = -1
"""As `Route.decode_replica`: the router says it once the prefill is done (`PullingRouter`)."""


@dataclass(frozen=True, slots=True)
class Move:
    """A live migration: this request, which decodes on one replica, goes on on another, with its KV."""

    request: Request
    source: int
    target: int


PoolRole = Literal["both", "prefill", "decode"]
"""What the replicas of a pool are for; a router that moves KV sends prefills and decodes where they belong."""


class Replica(Protocol):
    """One replica, as a router sees it. The figures may be stale; what it has sent itself a router can count
    (`policies.routing`)."""

    @property
    def id(self) -> int: ...
    @property
    def pool(self) -> str:
        """The name of the pool that it belongs to; empty where all replicas are alike."""
        ...

    @property
    def role(self) -> PoolRole: ...
    @property
    def cost(self) -> CostModel | None:
        """What its steps will cost; None where nobody knows."""
        ...

    @property
    def max_num_seqs(self) -> int:
        """Requests that it runs at once."""
        ...

    @property
    def num_waiting(self) -> int: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_prefill_tokens(self) -> int:
        """Prompt tokens still to compute: of a waiting request all, since its prefix hit is not known yet."""
        ...

    @property
    def num_outstanding_tokens(self) -> int:
        """Prompt tokens still to compute, and one for each request that decodes."""
        ...

    @property
    def num_blocks(self) -> int: ...
    @property
    def num_free_blocks(self) -> int:
        """Blocks that hold nothing, or cached ones that nobody uses. What waits does not count yet."""
        ...

    def match(self, keys: Sequence[bytes]) -> int:
        """How many leading blocks of a chain it has cached."""
        ...


@runtime_checkable
class Router(Protocol):
    """Which replica gets a request."""

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        """Where it goes, or None to refuse it. `keys` are those of the prompt's full blocks, or none. `replicas` holds
        only those that take requests, never none."""
        ...

    def on_end(self, request: Request, replica: int, now: int) -> None:
        """A request has ended, or left the replica: once for each route, which a router before this one may have
        given, also for a replica that is gone."""
        ...


class ClusterReplica(Replica, Protocol):
    """A replica between which and others KV can move, as `pull` and `rebalance` see it."""

    @property
    def num_incoming_blocks(self) -> int:
        """Blocks of requests whose KV is on its way here, or has come and has not run yet; `num_free_blocks` is
        without them."""
        ...

    def decoding(self) -> Iterator[Request]:
        """The requests that decode here and are not moving. Costs as many steps as there are running ones."""
        ...


@runtime_checkable
class PullingRouter(Router, Protocol):
    """A router that says where a request decodes only once its prefill is done (`LATER`)."""

    def pull(self, request: Request, replicas: Sequence[ClusterReplica], now: int) -> int | None:
        """The replica that takes it now, or None: it waits, with its blocks, where it is. The one where it is: it goes
        on there. Asked about whoever waits longest whenever a replica's memory may have changed. Changes nothing: the
        replica may have no room."""
        ...


@runtime_checkable
class RebalancingRouter(Router, Protocol):
    """A router that moves requests while they decode."""

    rebalance_ns: int
    """How often it is asked, while any request is alive."""

    def rebalance(self, replicas: Sequence[ClusterReplica], now: int) -> Sequence[Move]:
        """Who is to go where. A move that cannot be done is not, and its request goes on where it is."""
        ...


@runtime_checkable
class Autoscaler(Protocol):
    """How many replicas a pool should have. Only simulations start and stop replicas by it so far."""

    every_ns: int
    """How often it is asked, while any request is alive or to come; 0: never."""

    def scale(self, replicas: Sequence[Replica], num_starting: int, now: int) -> int:
        """How many there should be, those that start included, at least 1. `replicas` are those of the pool that take
        requests. Which of them go, should they be too many, is not the policy's: the least loaded, and each of them
        finishes what it has."""
        ...

    def on_end(self, request: Request, replica: int, now: int) -> None:
        """A request that was sent to the pool has ended; `request` says when it came and had its first token."""
        ...


class TransferCost(Protocol):
    """What it takes to move KV, for routers whose constructors ask for `transfer`."""

    def transfer_ns(self, num_blocks: int) -> int:
        """So many KV blocks from one replica to another over an idle link, in nanoseconds."""
        ...


class Recorder(Protocol):
    """Takes the run's records as they arise. Rows are tuples in the order of the columns in `policies.records`."""

    def request(self, row: tuple[object, ...]) -> None: ...
    def step(self, row: tuple[object, ...]) -> None: ...
    def decision(self, row: tuple[object, ...]) -> None: ...
