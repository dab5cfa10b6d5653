"""A simulation that is fed while it runs, with requests whose output lengths are not known yet.

For a simulation beside a live server: requests come as they come there, and how long an output is comes out only when
it has ended there. The clock goes on as long as nothing depends on what is not known: a step that would give a request
a token of which nobody can say yet whether it is its last stops it, until somebody can. So what comes out is what
`Simulation.run` makes of the same requests with their true lengths, whenever these became known.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import simpy

from policies.request import Request
from simulator.arrivals import Arrival
from simulator.replica import SimulatedReplica
from simulator.simulation import Simulation


class FedSimulation(Simulation):
    """Takes arrivals by `feed`, what becomes known of them by `reached`, `ended`, `cancelled`; `advance` goes on.

    Arguments are those of `Simulation`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options, together=False)
        self._arrivals: dict[int, Arrival] = {}  # alive
        self._open: dict[int, int] = {}  # of those with an unknown length: that it is above this
        self._hold: simpy.Event | None = None  # succeeds once more is known; meanwhile the clock stands
        for replica in self.replicas:
            replica.unknown_end = partial(self._unknown_end, replica)

    @property
    def now_ns(self) -> int:
        return int(self.env.now)

    @property
    def held(self) -> bool:
        """Whether the last `advance` came to a step whose ends are not known."""
        return self._hold is not None

    def feed(self, arrival: Arrival, *, known: bool) -> None:
        """A request will come, no sooner than now. Not `known`: its `output_tokens` are only its cap so far."""
        request = arrival.request
        self._arrivals[request.id] = arrival
        if not known:
            self._open[request.id] = 0
        self.at(request.arrival_ns, lambda: self._admit(arrival))

    def reached(self, request_id: int, tokens: int) -> None:
        """Its output has more than so many tokens."""
        if request_id in self._open:
            self._open[request_id] = max(tokens, self._open[request_id])

    def ended(self, request_id: int, output_tokens: int) -> None:
        """Its output has so many tokens, at least 1."""
        arrival = self._arrivals.get(request_id)
        if arrival is None or self._open.pop(request_id, None) is None:
            return
        arrival.output_tokens = output_tokens
        for replica in self.replicas:
            replica.correct_length(arrival)

    def cancelled(self, request_id: int, at_ns: int) -> None:
        """Its client goes away, no sooner than now."""
        self._open.pop(request_id, None)
        self.at(at_ns, lambda: self.cancel(request_id))

    def advance(self, until_ns: int, max_events: int | None = None) -> bool:
        """Go on to a time, or as far as is known. False where only `max_events` kept it from getting further."""
        if self._hold is not None:
            self._hold.succeed()
            self._hold = None
        events = 0
        while self._hold is None and self.env.peek() <= until_ns:
            if events == max_events:
                return False
            self.env.step()
            events += 1
        return True

    def close(self) -> None:
        """Record what has not ended."""
        for replica in self.replicas:
            replica.plane.close()

    def _unknown_end(self, replica: SimulatedReplica) -> simpy.Event | None:
        """What a step that has just been planned is to wait for before its ends are asked for."""
        for request in replica.plane.view.running.values():
            reached = self._open.get(request.id)
            # The tokens count the one that this step adds. None beyond the first unknown one can be asked for, as the
            # step that would add that one waits; the last one before the cap leaves only the cap.
            if reached is not None and reached < request.num_output_tokens < request.max_tokens_in_all:
                self._hold = self._hold or self.env.event()
                return self._hold
        return None

    def _on_end(self, request: Request) -> None:
        self._arrivals.pop(request.id, None)
        self._open.pop(request.id, None)
        super()._on_end(request)
