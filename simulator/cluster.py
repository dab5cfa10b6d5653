"""A simulation of pools: replicas that differ from pool to pool, and of which there may be more or fewer with time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import simpy

from policies.contract import Autoscaler, PoolRole, Router
from policies.control_plane import RequestRefused
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import PolicyStack
from simulator.arrivals import Arrival
from simulator.costs.base import CostModel
from simulator.links import LinkSpeed
from simulator.member import Member
from simulator.simulation import Simulation

OnChange = Callable[[int, int, str, str], None]
"""Told what happens to replicas: time in ns, replica, its pool, and `start`, `serve`, `drain`, `stop` or `fail`."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Replicas that are alike.

    Attributes:
        stack: makes the policies of one replica.
        num_replicas: that take requests from the start on.
        link: for KV that they send.
        autoscaler: says how many there should be; None: always so many.
        cold_start_ns: from being asked for until a replica takes requests.
    """

    limits: Limits
    costs: CostModel
    stack: Callable[[], PolicyStack]
    num_replicas: int = 1
    name: str = ""
    role: PoolRole = "both"
    link: LinkSpeed | None = None
    autoscaler: Autoscaler | None = None
    cold_start_ns: int = 0


@dataclass(slots=True)
class _Members:
    """A pool as it is."""

    pool: Pool
    replicas: list[Member] = field(default_factory=list)  # serving, starting or draining

    @property
    def serving(self) -> list[Member]:
        return [replica for replica in self.replicas if replica.takes_requests]

    @property
    def starting(self) -> list[Member]:
        return [replica for replica in self.replicas if replica.starting]


class Cluster(Simulation):
    """Pools behind one router.

    A request is offered only those replicas that could ever hold it, as long as there are any. While no replica takes
    requests but some start, or an autoscaler will have one start, arrivals wait for the first. Replicas that are one
    too many take nothing new and stop once they have finished what they have: those that start still go first, the last
    one asked for before the others, then those with the fewest requests, of equal ones the highest id. One that has
    failed is replaced by an autoscaler.

    Args:
        pools: whose replicas have the numbers from 0 on, in order; those that come later have the next ones.
        on_change: told of all that happens to replicas.
        options: as of `Simulation`.
    """

    def __init__(
        self, pools: Sequence[Pool], router: Router | None = None, *, on_change: OnChange | None = None, **options: Any
    ) -> None:
        first = pools[0]
        if any(pool.limits.block_size != first.limits.block_size for pool in pools):
            raise ValueError("pools of one cluster have KV blocks of one size")
        self._pools = [_Members(pool) for pool in pools]
        self._pool_of: dict[int, _Members] = {}
        self._on_change = on_change
        self._held: list[Arrival] = []  # came while no replica took requests
        self._num_draining = 0
        self._alike = all(pool.limits.max_total_tokens == first.limits.max_total_tokens for pool in pools)
        super().__init__(first.limits, (), first.costs, router, link=first.link, **options)
        for members in self._pools:
            if members.pool.autoscaler is not None and members.pool.autoscaler.every_ns:
                if router is None:
                    raise ValueError("an autoscaler needs a router")
                self.env.process(self._autoscale(members, members.pool.autoscaler))

    def _populate(self, *nothing: object) -> None:
        for members in self._pools:
            for _ in range(members.pool.num_replicas):
                self._tell(self._new(members), "serve")

    def _new(self, members: _Members) -> Member:
        pool = members.pool
        replica = self._add(pool.limits, pool.stack(), pool.costs, pool.link)
        replica.pool, replica.role = pool.name, pool.role
        members.replicas.append(replica)
        self._pool_of[replica.id] = members
        return replica

    # Scaling

    def _autoscale(self, members: _Members, scaler: Autoscaler) -> Generator[simpy.Event, None, None]:
        while True:
            yield self.env.timeout(scaler.every_ns)
            if not (self._more_to_come or self._num_alive):
                return
            self._stop_the_idle(members)
            wanted = scaler.scale(members.serving, len(members.starting), int(self.env.now))
            self._scale(members, max(1, wanted))

    def _scale(self, members: _Members, wanted: int) -> None:
        surplus = len(members.serving) + len(members.starting) - wanted
        for _ in range(-surplus):
            self._start(members)
        for replica in members.starting[::-1][: max(0, surplus)]:
            replica.starting, replica.stopped = False, True
            members.replicas.remove(replica)
            self._tell(replica, "stop")
            surplus -= 1
        leaving = sorted(members.serving, key=lambda r: (r.num_waiting + r.num_running, -r.id))
        for replica in leaving[: max(0, min(surplus, len(leaving) - 1))]:
            replica.draining = True
            self._num_draining += 1
            self._tell(replica, "drain")
        if surplus > 0:
            self._roster_changed()
            self._stop_the_idle(members)

    def _start(self, members: _Members) -> None:
        replica = self._new(members)
        replica.starting = True
        self._tell(replica, "start")
        self._after(members.pool.cold_start_ns, lambda: self._serve(replica))

    def _serve(self, replica: Member) -> None:
        """It has started, unless it was told to go, or has failed, or nobody is there for it any more."""
        if not replica.starting or not (self._more_to_come or self._num_alive):
            return
        replica.starting = False
        self._tell(replica, "serve")
        self._roster_changed()
        held, self._held = self._held, []
        for arrival in held:
            if not arrival.request.state.ended:
                self._dispatch(arrival)

    def _stop_the_idle(self, members: _Members) -> None:
        for replica in [replica for replica in members.replicas if replica.draining and replica.idle]:
            if self._movements is None or not self._movements.awaits(replica.id):
                replica.draining, replica.stopped = False, True
                self._num_draining -= 1
                members.replicas.remove(replica)
                self._tell(replica, "stop")

    def fail(self, replica: int) -> None:
        member = self.replicas[replica]
        if member.failed or member.stopped:
            return
        self._num_draining -= member.draining
        member.draining = member.starting = False
        super().fail(replica)
        self._tell(member, "fail")
        self._pool_of[replica].replicas.remove(member)
        self._release_unless_some_will_serve()

    def _tell(self, replica: Member, what: str) -> None:
        if self._on_change is not None:
            now = max(int(self.env.now), replica.now if what == "stop" else 0)
            self._on_change(now, replica.id, replica.pool, what)

    # Requests

    def _candidates(self, request: Request) -> list[Member]:
        if self._alike:
            return self._routable
        tokens = request.num_prompt_tokens + 1
        able = [r for r in self._routable if tokens <= r.plane.limits.max_total_tokens]
        return able or self._routable

    def _dispatch(self, arrival: Arrival) -> None:
        if not self._routable and self._some_will_serve:
            self._held.append(arrival)
        else:
            super()._dispatch(arrival)

    @property
    def _some_will_serve(self) -> bool:
        """Whether a replica starts, or will be asked for: an autoscaler always wants one."""
        scalers = [members.pool.autoscaler for members in self._pools]
        return any(members.starting for members in self._pools) or any(s is not None and s.every_ns for s in scalers)

    def _release_unless_some_will_serve(self) -> None:
        """Nobody will come for those that wait: they are refused, as all are then."""
        if self._held and not self._some_will_serve:
            held, self._held = self._held, []
            for arrival in held:
                super()._dispatch(arrival)

    def _before_close(self) -> None:
        for arrival in self._held:
            with suppress(RequestRefused):
                self.replicas[-1].plane.submit(arrival.request, int(self.env.now), arrival.keys)

    def cancel(self, request_id: int) -> None:
        for arrival in self._held:
            if arrival.request.id == request_id:
                self._held.remove(arrival)
                last, now = self.replicas[-1], int(self.env.now)  # where its end is recorded
                if last.failed:
                    with suppress(RequestRefused):
                        last.plane.submit(arrival.request, now, arrival.keys)
                        last.plane.cancel(request_id, now)
                else:
                    last.receive(arrival)
                    last.cancel(request_id)
                return
        super().cancel(request_id)

    def _on_end(self, request: Request) -> None:
        replica = self._replica_of.get(request.id)
        super()._on_end(request)
        if replica is None:
            return
        members = self._pool_of[replica]
        if members.pool.autoscaler is not None:
            now = max(int(self.env.now), self.replicas[replica].now)  # a replica may be ahead
            members.pool.autoscaler.on_end(request, replica, now)
        for each in self._pools if self._num_draining else ():  # it may have ended in another pool
            self._stop_the_idle(each)
