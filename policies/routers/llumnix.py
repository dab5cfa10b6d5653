from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from policies.block_pool import num_blocks
from policies.contract import ClusterReplica, Move, Replica, Route
from policies.registry import register
from policies.request import Request, State

PAIRINGS = ("guarded", "balanced", "defrag")
QUEUED = (State.WAITING, State.SWAPPED)


@register("router", "llumnix")
class Llumnix:
    """The freest replica, and requests that decode are moved live from the least free replicas to the freest.

    Sun et al., "Llumnix: Dynamic Scheduling for Large Language Model Serving", OSDI 2024, sections 4.4 and 5.

        freeness = (memory - virtual usage) / batch size                in KV blocks a request
        virtual usage = blocks in use + blocks that queued requests ask for + headroom

    It is times the block size the steps that a replica can go on for; below 0 where a queue asks for more than there
    is. Headroom: where a request of high priority runs (`Request.priority` at most `high`, -1), all memory but
    `target_tokens` (1600, the paper's for a 7B model on an A10) counts as used, so that others stay or are moved away.
    A replica that drains has a freeness of -infinity, an empty one of +infinity; ties go to the lowest id.

    An arrival goes to the freest replica. Every `every_ms` (50, as the code polls) those below `migrate_out` (3) are
    paired with those above `migrate_in` (none: the same), the least free with the freest, the second with the second,
    and each pair moves one request: of the lowest priority, of those the shortest. A replica that is still sending one
    sends no other. `migrate=false` only dispatches. What pairs are for depends on `pairing`:

    `defrag` (the code's default): any, as far as the request fits.
    `balanced` (the code's other one): the target stays above `migrate_in`, and its freeness above the source's, with
        less between them than before; or the target is empty.
    `guarded` (ours, the default): the target stays above `migrate_in`. Unlike `balanced` it lets a long request go if
        that lets a blocked one in. Who has taken one is no source, so at steady load nobody is moved twice.

    Draining: `drain(replica)`, or `drain=1:2` (ids) with `drain_at_s` (0). It gets no arrivals while another takes any,
    and what decodes there is moved away, wherever it fits; what is queued there is once it decodes.

    Published code and paper differ. The paper counts the head of the queue alone; the code does so for migration, as
    this does, but for dispatch all that is queued, and in the batch size too: as this does, since a burst would go to
    one replica otherwise. Thresholds are in blocks a request, as in the code. The paper dispatches high priorities
    first; arrivals do not wait here, so that is the replicas' queue's (`priority`). Instances are not scaled.
    What is queued before a replica is told by what was sent there; its order is taken to be priority, then arrival.

    Dispatch O(R + requests of high priority), rebalancing O(what is in flight). Memory: what is in flight.
    """

    moves_kv = True

    def __init__(
        self,
        every_ms: float = 50.0,
        migrate: bool = True,
        migrate_out: float = 3.0,
        migrate_in: float | None = None,
        pairing: str = "guarded",
        high: int = -1,
        target_tokens: int = 1600,
        drain: str = "",
        drain_at_s: float = 0.0,
        block_size: int = 16,
    ) -> None:
        if every_ms < 1e-6:
            raise ValueError(f"every_ms must be at least a nanosecond, not {every_ms}")
        if pairing not in PAIRINGS:
            raise ValueError(f"pairing must be one of {', '.join(PAIRINGS)}, not {pairing}")
        if migrate_in is not None and migrate_in < migrate_out:
            raise ValueError(f"migrate_in {migrate_in} is below migrate_out {migrate_out}: a replica would be both")
        if target_tokens < 0 or drain_at_s < 0:
            raise ValueError(f"target_tokens and drain_at_s must be at least 0, not {target_tokens} and {drain_at_s}")
        self.rebalance_ns = round(every_ms * 1e6)
        self._migrate = migrate
        self._out = migrate_out
        self._in = migrate_out if migrate_in is None else migrate_in
        self._pairing = pairing
        self._high = high
        self._target_blocks = num_blocks(target_tokens, block_size)
        self._to_drain = _ids(drain)
        self._drain_at_ns = round(drain_at_s * 1e9)
        self._block_size = block_size
        self._draining: dict[int, None] = {}
        self._at: dict[int, int] = {}  # request id -> replica
        self._requests: dict[int, dict[int, Request]] = {}  # by replica: what was sent there, or moved
        self._urgent: dict[int, dict[int, Request]] = {}  # of those the ones of high priority
        self._moving: dict[int, tuple[Request, int, int]] = {}  # request id -> itself, source, target

    def drain(self, replica: int) -> None:
        """Send nothing more there, and move away what is there."""
        self._draining[replica] = None

    # Dispatch

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        self._see(replicas, now)
        freest = max((self.dispatch_load(replica).freeness, -replica.id) for replica in replicas)
        chosen = -freest[1]
        self._put(request, chosen)
        return Route(chosen)

    def dispatch_load(self, replica: Replica) -> Load:
        """A replica as an arrival sees it, with all that is queued there."""
        queued = num_blocks(replica.num_prefill_tokens, self._block_size)
        return self._load(replica, queued, replica.num_waiting + replica.num_running)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        self._forget(request)
        self._moving.pop(request.id, None)

    # Rebalancing

    def rebalance(self, replicas: Sequence[ClusterReplica], now: int) -> Sequence[Move]:
        self._see(replicas, now)
        decoding = {replica.id: list(replica.decoding()) for replica in replicas}
        self._follow(decoding)
        if not self._migrate:
            return []
        loads = {replica.id: self.migration_load(replica) for replica in replicas}
        sending = {source for _, source, _ in self._moving.values()}
        order = sorted(loads, key=lambda i: (loads[i].freeness, i))
        sources = [i for i in order if loads[i].freeness < self._out and i not in sending and decoding[i]]
        targets = sorted((i for i in order if loads[i].freeness > self._in), key=lambda i: (-loads[i].freeness, i))
        moves = []
        for source, target in zip(sources, targets, strict=False):
            request = min(decoding[source], key=lambda r: (-r.priority, r.num_tokens, r.key))
            if self._helps(request, loads[source], loads[target]):
                moves.append(Move(request, source, target))
                self._moving[request.id] = (request, source, target)
        return moves

    def migration_load(self, replica: ClusterReplica) -> Load:
        """A replica as migration sees it: with the head of its queue, and what is on its way there."""
        waiting = [r for r in self._requests.get(replica.id, {}).values() if r.state in QUEUED]
        queued = 0
        if waiting:
            head = min(waiting, key=lambda r: (r.priority, r.key))
            queued = num_blocks(head.num_tokens, self._block_size)
        coming = sum(target == replica.id for _, _, target in self._moving.values())
        return self._load(replica, queued, replica.num_running + min(1, replica.num_waiting) + coming)

    def _helps(self, request: Request, source: Load, target: Load) -> bool:
        """Whether a pair may move this request, by the rule of `pairing`."""
        blocks, high = num_blocks(request.num_tokens, self._block_size), request.priority <= self._high
        if blocks > target.blocks - target.used:
            return False
        if source.draining or self._pairing == "defrag":
            return True
        rest, more = source.with_request(-blocks, -1, -high), target.with_request(blocks, 1, high)
        if more.freeness <= self._in:
            return False
        if self._pairing == "guarded":
            return True
        return math.isinf(target.freeness) or 0 < more.freeness - rest.freeness < target.freeness - source.freeness

    def _load(self, replica: Replica, queued: int, batch: int) -> Load:
        urgent = sum(r.state not in QUEUED for r in self._urgent.get(replica.id, {}).values())
        used = replica.num_blocks - replica.num_free_blocks
        headroom = max(0, replica.num_blocks - self._target_blocks)
        return Load(replica.num_blocks, used, queued, batch, urgent, headroom, replica.id in self._draining)

    # What is where

    def _see(self, replicas: Iterable[Replica], now: int) -> None:
        """Begin to drain in time; one that comes back fresh does not."""
        if self._to_drain and now >= self._drain_at_ns:
            self._draining.update(dict.fromkeys(self._to_drain))
            self._to_drain = ()
        if self._draining:
            here = {replica.id for replica in replicas}
            self._draining = {i: None for i in self._draining if i in here}

    def _follow(self, decoding: dict[int, list[Request]]) -> None:
        """Learn who has been moved, and which moves have come to nothing."""
        for replica, requests in decoding.items():
            for request in requests:
                self._moving.pop(request.id, None)
                if self._at.get(request.id, replica) != replica:
                    self._put(request, replica)
        for request, _, _ in list(self._moving.values()):
            if request.state is not State.MOVING and not _decodes(request):
                del self._moving[request.id]  # it was preempted, and no longer goes

    def _put(self, request: Request, replica: int) -> None:
        self._forget(request)
        self._at[request.id] = replica
        self._requests.setdefault(replica, {})[request.id] = request
        if request.priority <= self._high:
            self._urgent.setdefault(replica, {})[request.id] = request

    def _forget(self, request: Request) -> None:
        replica = self._at.pop(request.id, None)
        if replica is None:
            return
        for books in (self._requests, self._urgent):
            held = books.get(replica, {})
            held.pop(request.id, None)
            if not held:
                books.pop(replica, None)


@dataclass(frozen=True, slots=True)
class Load:
    """A replica as Llumnix counts it, in KV blocks. `urgent`: requests of high priority that hold memory there."""

    blocks: int
    used: int
    queued: int
    batch: int
    urgent: int = 0
    headroom: int = 0
    draining: bool = False

    @property
    def virtual_usage(self) -> int:
        return self.used + self.queued + (self.headroom if self.urgent else 0)

    @property
    def freeness(self) -> float:
        """Free blocks a request."""
        if self.draining:
            return -math.inf
        return (self.blocks - self.virtual_usage) / self.batch if self.batch else math.inf

    def with_request(self, blocks: int, requests: int, urgent: int) -> Load:
        """With so many more blocks, requests, and requests of high priority."""
        return replace(
            self, used=self.used + blocks, batch=max(0, self.batch + requests), urgent=max(0, self.urgent + urgent)
        )


def _decodes(request: Request) -> bool:
    return request.state is State.RUNNING and request.num_pending_tokens == 1


def _ids(text: str) -> tuple[int, ...]:
    try:
        ids = tuple(map(int, text.split(":"))) if text else ()
    except ValueError:
        ids = (-1,)
    if any(i < 0 for i in ids):
        raise ValueError(f"drain must be ids of replicas with colons between them, not {text!r}")
    return ids
