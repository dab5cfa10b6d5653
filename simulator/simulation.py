"""A whole simulation: arrivals, a router, replicas."""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

import simpy

from policies.collecting import few_collections
from policies.contract import LATER, RebalancingRouter, Recorder, Route, Router
from policies.control_plane import ControlPlane
from policies.plan import Step
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import PolicyStack
from simulator.arrivals import Arrival, Cancellation, Scheduled
from simulator.costs.base import CostModel, predicted
from simulator.links import LinkSpeed
from simulator.member import Member
from simulator.movements import Movements
from simulator.network import Network
from simulator.pace import ComputedPace, RecordedPace, Timing
from simulator.replica import SimulatedReplica


class Simulation:
    """Replicas behind a router, fed by arrivals, and by those that follow from ends.

    Args:
        limits: what each replica holds and runs.
        stacks: one policy stack a replica (policies hold state).
        costs: turns steps into time; shared, since it holds none.
        router: gets every arrival; needed only with more than one replica.
        link: of each replica, for KV that moves between them; None: a route that would move any is refused.
        recorder: takes the rows of the run; None records nothing.
        on_end: called with every request that ends.
        followers: called with every request that ends and the time; answers who arrives because of that, at stamps that
            are not earlier.
        gives_up: the same, called with every request whose client gives up (`Arrival.timeout_ns`), before it is
            cancelled.
        check: verify the invariants after every step (slow).
        together: do not ask a policy for decode steps that it would plan alike, and take many of them in one event; the
            records are the same without, bit for bit. Not where KV moves between replicas, nor
            behind a router with followers.
    """

    def __init__(
        self,
        limits: Limits,
        stacks: Sequence[PolicyStack],
        costs: CostModel,
        router: Router | None = None,
        *,
        link: LinkSpeed | None = None,
        recorder: Recorder | None = None,
        on_end: Callable[[Request], None] | None = None,
        followers: Callable[[Request, int], Iterable[Arrival]] | None = None,
        gives_up: Callable[[Request, int], Iterable[Arrival]] | None = None,
        check: bool = False,
        together: bool = True,
    ) -> None:
        self.env = simpy.Environment(initial_time=0)
        self._router = router
        self._block_size = limits.block_size
        self._recorder = recorder
        self._user_on_end = on_end
        self._followers = followers
        self._gives_up = gives_up
        self._check = check
        self._replica_of: dict[int, int] = {}
        self.replicas: list[Member] = []
        self._routable: list[Member] = []
        self._watched = True  # by others than the arrivals
        self._network = Network(self.env)
        self._movements: Movements | None = None
        self._num_alive = 0
        self._more_to_come = True
        if link is not None and router is not None:
            self._movements = Movements(self.env, self.replicas, self._network, router)
            if isinstance(router, RebalancingRouter):
                self.env.process(self._rebalance(router))
        # Behind a router, who follows from an end would come in another order than the plan of that instant.
        self._together = together and self._movements is None and (router is None or followers is None)
        self._populate(limits, stacks, costs, link)
        if not self.replicas:
            raise ValueError("a simulation needs at least one replica")
        if len(self.replicas) > 1 and router is None:
            raise ValueError(f"{len(self.replicas)} replicas need a router")
        self._watched = router is not None or gives_up is not None
        self._roster_changed()

    def _populate(
        self, limits: Limits, stacks: Sequence[PolicyStack], costs: CostModel, link: LinkSpeed | None
    ) -> None:
        """Make the replicas that there are from the start on."""
        for stack in stacks:
            self._add(limits, stack, costs, link)

    def _add(self, limits: Limits, stack: PolicyStack, costs: CostModel, link: LinkSpeed | None) -> Member:
        """One more replica."""
        plane = ControlPlane(
            limits,
            stack,
            replica=len(self.replicas),
            cost=predicted(costs),
            recorder=self._recorder,
            check=self._check,
        )
        replica = Member(self.env, plane, ComputedPace(costs, limits.plan_lead_ns), self._on_end)
        replica.movements = self._movements
        replica.together = self._together
        replica.watched = self._watched
        if link is not None:
            self._network.add(link)
        self.replicas.append(replica)
        return replica

    def _roster_changed(self) -> None:
        """Other replicas take requests than before."""
        self._routable = [replica for replica in self.replicas if replica.takes_requests]

    def run(self, arrivals: Iterable[Arrival], until_ns: int | None = None) -> int:
        """Simulate until every request has ended, or until `until_ns`. Returns the simulated time in nanoseconds.

        `arrivals` come in the order of their stamps and may be endless with `until_ns`. What is unfinished at the end,
        or at an interruption, is recorded as such.
        """
        for replica in self.replicas:
            replica.watched = self._watched or until_ns is not None
        try:
            with few_collections():
                self.env.process(self._source(arrivals))
                self.env.run(until=until_ns)
        finally:
            self._before_close()
            for replica in self.replicas:
                replica.plane.close()
        return max(int(self.env.now), *(replica.now for replica in self.replicas))

    def _before_close(self) -> None:
        """The run is over: see that whoever is nowhere yet is on a replica, whose control plane records it."""

    def _source(self, arrivals: Iterable[Arrival]) -> Generator[simpy.Event, None, None]:
        env = self.env
        for arrival in arrivals:
            wait = arrival.request.arrival_ns - env.now
            if wait > 0:
                yield env.timeout(wait)
            self._num_alive += 1
            self._admit(arrival)
        self._more_to_come = False

    def _admit(self, arrival: Arrival) -> None:
        if arrival.timeout_ns is not None:
            self._after(arrival.timeout_ns, lambda: self._client_leaves(arrival.request))
        self._dispatch(arrival)

    def _dispatch(self, arrival: Arrival) -> None:
        """To its replica, or to nobody."""
        if self._router is None:
            self.replicas[0].receive(arrival)
            return
        request, alive = arrival.request, self._candidates(arrival.request)
        # Of the prompt alone: keys of blocks that its output will fill would give its length away.
        keys = arrival.keys[: request.num_prompt_tokens // self._block_size]
        route = self._router.route(request, keys, alive, int(self.env.now)) if alive else None
        moves = route is not None and (route.kv_from is not None or route.decode_replica not in (None, route.replica))
        reason = "refused by the router" if alive else "every replica has failed"
        if route is None or (moves and self._movements is None):
            reason = reason if route is None else "no transfer of KV blocks between replicas"
            self.replicas[0].plane.refuse(request, reason)
            return
        target = self.replicas[self._checked(route.replica)]
        self._replica_of[request.id] = target.id
        if moves and self._movements is not None:
            self._admit_with_kv(arrival, keys, route, target, self._movements)
        else:
            target.receive(arrival)

    def _candidates(self, request: Request) -> list[Member]:
        """The replicas that the router may choose from for this request."""
        return self._routable

    def _admit_with_kv(
        self, arrival: Arrival, keys: Sequence[bytes], route: Route, target: SimulatedReplica, movements: Movements
    ) -> None:
        """A request whose route moves KV: fetched before it computes, or taken elsewhere after its first token."""
        decode = route.decode_replica
        if decode not in (None, route.replica):
            movements.decode_at(arrival.request, decode if decode == LATER else self._checked(decode))
            arrival.hands_off = True
        if route.kv_from is None or route.kv_from == route.replica:
            target.receive(arrival)
        else:
            source = self.replicas[self._checked(route.kv_from)]
            self.env.process(movements.fetch(arrival, keys, source, target))

    def cancel(self, request_id: int) -> None:
        """A client goes away, wherever its request is."""
        if not any(replica.plane.cancel(request_id, int(self.env.now)) for replica in self.replicas):
            for replica in self.replicas:
                replica.cancel(request_id)

    def fail(self, replica: int) -> None:
        """A replica dies: its requests end as cancelled, with that for an error; those on their way there go on where
        they are; no more is routed to it."""
        if self._movements is not None:
            self._movements.fail(replica)
        self.replicas[replica].fail()
        self._roster_changed()

    def cut_link(self, replica: int) -> None:
        """A replica can send no KV any more: what it has sent away, or would, goes on where it is."""
        self._network.cut(replica)

    def mend_link(self, replica: int) -> None:
        """It can again."""
        self._network.mend(replica)

    def at(self, time_ns: int, do: Callable[[], None]) -> None:
        """Have something happen at a time, such as `cancel` or `fail`."""
        self._watched = True
        for replica in self.replicas:
            replica.watched = True
        self._after(time_ns - int(self.env.now), do)

    def _rebalance(self, router: RebalancingRouter) -> Generator[simpy.Event, None, None]:
        movements = self._movements
        assert movements is not None
        while True:
            yield self.env.timeout(router.rebalance_ns)
            if not (self._more_to_come or self._num_alive):
                return
            for move in router.rebalance(self._routable, int(self.env.now)):
                source, target = (self.replicas[self._checked(i)] for i in (move.source, move.target))
                movements.migrate(move, source, target)

    def _checked(self, replica: int) -> int:
        index = operator.index(replica)
        if not 0 <= index < len(self.replicas):
            name = type(self._router).__name__
            raise IndexError(f"{name}.route answered replica {replica}; there are 0 to {len(self.replicas) - 1}")
        return index

    def _on_end(self, request: Request) -> None:
        self._num_alive -= 1
        if self._movements is not None:
            self._movements.forget(request)
        replica = self._replica_of.pop(request.id, None)
        if self._router is not None and replica is not None:  # None: the router itself has refused it
            self._router.on_end(request, replica, max(int(self.env.now), self.replicas[replica].now))
        if self._user_on_end is not None:
            self._user_on_end(request)
        if self._followers is not None:
            # Where a replica goes on by itself, it has ended, or been refused, at a time to come.
            ended = max(int(self.env.now), request.finish_ns or 0, self.replicas[0].now if self._router is None else 0)
            for arrival in self._followers(request, ended):
                self._num_alive += 1
                self._follow(arrival)

    def _follow(self, arrival: Arrival) -> None:
        """Have it come. What is due now is in the plan that follows in this instant, where no router is to be asked."""
        wait = max(0, arrival.request.arrival_ns - int(self.env.now))
        if not wait and self._router is None:
            self._admit(arrival)
        else:
            self._after(wait, lambda: self._admit(arrival))

    def _client_leaves(self, request: Request) -> None:
        if request.state.ended:
            return
        for arrival in () if self._gives_up is None else self._gives_up(request, int(self.env.now)):
            self._num_alive += 1
            self._follow(arrival)
        if self._router is None:
            self.replicas[0].cancel(request.id)  # before the next plan, as an engine is told
        else:
            self.cancel(request.id)

    def _after(self, delay_ns: int, do: Callable[[], None]) -> None:
        callbacks = self.env.timeout(delay_ns).callbacks
        assert callbacks is not None
        callbacks.append(lambda _: do())


Intervention = Callable[[ControlPlane, int], object]
"""What an operator did to a replica, at a time: called with its control plane and now."""


def replay(
    limits: Limits,
    stack: PolicyStack,
    rows: Sequence[tuple[int, Timing]],
    scheduled: Iterable[Scheduled],
    *,
    interventions: Mapping[int, Sequence[Intervention]] | None = None,
    cost: CostModel | None = None,
    recorder: Recorder | None = None,
    check: bool = False,
) -> ControlPlane:
    """Take a recorded run's arrivals and step times through the simulated replica.

    `rows[i]` are the times of the i-th call of plan(); `scheduled` says before which call each request came and, where
    it was cancelled, before which call that was. `interventions`, by the index of the call that they came before,
    follow both. With the same policy stack every plan must come out as recorded.
    """
    env = simpy.Environment(initial_time=0)
    plane = ControlPlane(limits, stack, cost=cost, recorder=recorder, check=check)
    replica = _ReplayedReplica(env, plane, RecordedPace(rows), lambda request: None)
    replica.schedule(scheduled, interventions or {})
    env.run()
    plane.close()
    return plane


class _ReplayedReplica(SimulatedReplica):
    """Takes each request before the plan that the record names, instead of by the clock."""

    def schedule(self, scheduled: Iterable[Scheduled], interventions: Mapping[int, Sequence[Intervention]]) -> None:
        self._submit_before: dict[int, list[Arrival]] = {}
        self._cancel_before: dict[int, dict[int, Cancellation]] = {}
        self._interventions = interventions
        for item in sorted(scheduled, key=lambda s: s.arrival.request.key):
            self._submit_before.setdefault(item.before_step, []).append(item.arrival)
            if item.cancelled is not None:
                at = self._cancel_before.setdefault(item.cancelled.before_step, {})
                at[item.arrival.request.id] = item.cancelled

    def _deliver(self, now: int) -> None:
        index = self.plane.next_step
        self._arrivals = self._submit_before.pop(index, [])
        super()._deliver(now)
        for request_id, how in sorted(self._cancel_before.pop(index, {}).items()):
            self.plane.cancel(request_id, now, how.num_output_tokens, how.end)
        for intervene in self._interventions.get(index, ()):
            intervene(self.plane, now)

    def _use_disk(self, step: Step, now: int) -> None:
        """The record says what came when: among the interventions."""
