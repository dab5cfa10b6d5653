"""KV that moves between the replicas of a simulation: finished prefills, running requests, cached prefixes.

A finished prefill waits at its replica, with its blocks, until the one that is to decode it has room for all of them
(that one pulls). Then it is sent while both compute, and may run once it is there. Nobody overtakes on the way to a
replica. Should a replica have room for nobody although nothing runs there, because what it holds waits for others in
turn, the request goes on where it is.

A running request that migrates goes on decoding while its blocks are copied, those that it fills meanwhile in a further
copy, until few are left or `MAX_STAGES` have been copied; for the last copy it stops (Llumnix, OSDI 2024, section 4.2).
Copies of a stage's blocks are one transfer here, and what Llumnix's handshakes take is the link's latency.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from typing import Any

import simpy

from policies.block_pool import num_blocks
from policies.contract import LATER, Move, PullingRouter, Router
from policies.request import Request, State
from simulator.arrivals import Arrival
from simulator.member import Member
from simulator.network import Network, Sending
from simulator.replica import SimulatedReplica

MAX_STAGES = 3
LAST_STAGE_BLOCKS = 1
"""So few full blocks left to copy are copied with the last one, while the request stands still."""


class Movements:
    """Carries out what routes and moves say. Replicas call `look` whenever their memory may have changed."""

    def __init__(self, env: simpy.Environment, replicas: Sequence[Member], network: Network, router: Router) -> None:
        self._env = env
        self._replicas = replicas
        self._network = network
        self._router = router
        self._decode_at: dict[int, int] = {}  # request id -> replica, or LATER
        self._offers: dict[int, deque[Request]] = {}  # finished prefills, by the replica that they wait for
        self._at: dict[int, SimulatedReplica] = {}  # of requests that move: where they are
        self._sendings: dict[int, Sending] = {}  # request id -> its KV on its way
        self._looking = False

    @property
    def _now(self) -> int:
        return int(self._env.now)

    def forget(self, request: Request) -> None:
        """It has ended: what is on its way for it is of no use."""
        self._decode_at.pop(request.id, None)
        self._at.pop(request.id, None)
        if request.id in self._sendings:
            self._network.abort(self._sendings[request.id])

    def fail(self, replica: int) -> None:
        """A replica dies: nothing that is on its way from or to it arrives."""
        self._network.fail(replica)

    # Finished prefills

    def decode_at(self, request: Request, replica: int) -> None:
        """This request goes on there once it has its first token; LATER: the router will say where."""
        self._decode_at[request.id] = replica

    def prefilled(self, request: Request, source: SimulatedReplica) -> None:
        """It has its first token, and has stopped with its blocks."""
        self._at[request.id] = source
        self._offers.setdefault(self._decode_at[request.id], deque()).append(request)
        self.look()

    def awaits(self, replica: int) -> bool:
        """Whether a request that prefills elsewhere is to decode there."""
        return replica in self._decode_at.values()

    def look(self) -> None:
        """See who of those that wait can be pulled now."""
        if self._looking or not self._offers:
            return
        self._looking = True
        for target in sorted(self._offers):
            while self._offers[target] and self._pull(self._offers[target][0], target):
                self._offers[target].popleft()
            if not self._offers[target]:
                del self._offers[target]
        self._looking = False

    def _pull(self, request: Request, where: int) -> bool:
        """Whether this request has no longer to wait: it is being sent, goes on where it is, or has ended."""
        if request.state is not State.MOVING:
            return True
        source = self._at[request.id]
        target = self._target(request, where, source)
        if target is source:  # the router would have it stay
            source.take_back(request)
            del self._at[request.id]
            return True
        if target is None or target.failed:
            blocks = None
        else:
            blocks = target.plane.transfers.reserve(request, self._now)
        if target is not None and blocks is not None:
            self._env.process(self._send(request, source, target, blocks))
            return True
        candidates = [r for r in self._replicas if r is not source] if target is None else [target]
        if any(replica.makes_room for replica in candidates):
            return False
        source.take_back(request)
        del self._at[request.id]
        return True

    def _target(self, request: Request, where: int, source: SimulatedReplica) -> Member | None:
        if where == LATER:
            alive = [replica for replica in self._replicas if replica.takes_requests or replica is source]
            assert isinstance(self._router, PullingRouter), "a router that says LATER needs a method pull"
            named = self._router.pull(request, alive, self._now)
            return None if named is None else self._checked(named)
        return self._replicas[where]

    def _checked(self, named: int) -> Member:
        if not 0 <= named < len(self._replicas):
            name, last = type(self._router).__name__, len(self._replicas) - 1
            raise IndexError(f"{name}.pull answered replica {named}; there are 0 to {last}")
        return self._replicas[named]

    def _send(
        self, request: Request, source: SimulatedReplica, target: SimulatedReplica, blocks: int
    ) -> Generator[simpy.Event, Any, None]:
        """The last, or only, copy: from here on it is in nobody's queue until it has arrived."""
        arrived = yield from self._copy(request, source, target, blocks)
        self._at.pop(request.id, None)
        if request.state is not State.MOVING:  # it has ended meanwhile
            target.plane.transfers.unreserve(request, self._now)
        elif arrived and not target.failed:
            source.hand_over(request, target)
        else:
            target.plane.transfers.unreserve(request, self._now)
            source.take_back(request)
        target.wake()
        self.look()

    def _copy(
        self, request: Request, source: SimulatedReplica, target: SimulatedReplica, blocks: int
    ) -> Generator[simpy.Event, Any, bool]:
        sending = self._network.send(source.id, target.id, blocks)
        self._sendings[request.id] = sending
        arrived = yield sending.done
        del self._sendings[request.id]
        return bool(arrived)

    # Running requests

    def migrate(self, move: Move, source: SimulatedReplica, target: SimulatedReplica) -> None:
        """Start a live migration, unless the request moves already, does not decode there, or there is no room."""
        request = move.request
        running = request.state is State.RUNNING and request.num_pending_tokens == 1 and not request.hands_off
        if not running or request.id in self._at or source is target or source.failed or target.failed:
            return
        if not source.has(request):
            return
        blocks = target.plane.transfers.reserve(request, self._now)
        if blocks is not None:
            self._at[request.id] = source
            self._env.process(self._migrate(request, source, target, blocks))

    def is_moving(self, request: Request) -> bool:
        """Whether it is on its way to another replica, or being copied there."""
        return request.id in self._at

    def _migrate(
        self, request: Request, source: SimulatedReplica, target: SimulatedReplica, blocks: int
    ) -> Generator[simpy.Event, Any, None]:
        limits, preemptions = source.plane.limits, request.num_preemptions
        size, in_flight = limits.block_size, 1 + limits.lag
        copied = num_blocks(request.num_computed_tokens, size) - blocks  # in the target's cache already
        for _ in range(MAX_STAGES):
            full = (request.num_computed_tokens - in_flight) // size
            if full - copied <= LAST_STAGE_BLOCKS:
                break
            arrived = yield from self._copy(request, source, target, full - copied)
            copied = full
            if not arrived or request.state is not State.RUNNING or request.num_preemptions != preemptions:
                return self._give_up(request, target)
        transfers = target.plane.transfers
        if not transfers.reserve_more(request, self._now) or not source.plane.transfers.export(request, self._now):
            return self._give_up(request, target)
        while request.state is State.MOVING and not source.plane.view.settled(request):
            yield source.next_report()
        left = num_blocks(request.num_computed_tokens, size) - copied
        yield from self._send(request, source, target, left if request.state is State.MOVING else 0)
        return None

    def _give_up(self, request: Request, target: SimulatedReplica) -> None:
        """It stays where it is, or has ended."""
        self._at.pop(request.id, None)
        target.plane.transfers.unreserve(request, self._now)
        target.wake()
        self.look()

    # Cached prefixes

    def fetch(
        self, arrival: Arrival, keys: Sequence[bytes], source: SimulatedReplica, target: SimulatedReplica
    ) -> Generator[simpy.Event, Any, None]:
        """Bring a prompt's cached blocks to the replica that computes the rest, and hand it the request once they are
        there: at once where there is nothing to bring, or no room for it."""
        request, now = arrival.request, self._now
        found = source.plane.match(keys)
        blocks = target.plane.transfers.borrow(request, keys[:found], now) if not source.failed else 0
        if blocks:
            source.plane.transfers.lend(request, keys[:found], now)
            target.expect(arrival)
            arrived = yield from self._copy(request, source, target, blocks)
            source.plane.transfers.end_loan(request, self._now)
            target.plane.transfers.end_loan(request, self._now, keys[:found] if arrived else ())
            source.wake()
        target.receive(arrival)
        self.look()
