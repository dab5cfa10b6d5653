"""How long the prefills that a router has sent to a replica will keep it, by what each was expected to take."""

from __future__ import annotations

from policies.request import Request


class Backlog:
    """The prefills at one replica that have no first token yet, in the order in which they were sent.

    Their times are what the router expected when it sent them; how far those are that have begun is told by the clock.
    Meant for replicas that prefill first come, first served: one that is overtaken counts as whole until then. Memory:
    what is in flight.
    """

    def __init__(self) -> None:
        self._queue: dict[int, tuple[Request, int]] = {}
        self._total_ns = 0

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, request: Request, prefill_ns: int) -> None:
        self._queue[request.id] = (request, prefill_ns)
        self._total_ns += prefill_ns

    def remove(self, request_id: int) -> None:
        """It has ended; without effect if it is not here any more."""
        _, prefill_ns = self._queue.pop(request_id, (None, 0))
        self._total_ns -= prefill_ns

    def left_ns(self, now: int) -> int:
        """Until all of them are done. O(those that have begun or are done)."""
        done, begun_ns, since = [], 0, now
        for request, prefill_ns in self._queue.values():
            if request.first_token_ns is not None:
                done.append(request.id)
            elif request.first_scheduled_ns is not None:
                begun_ns += prefill_ns
                since = min(since, request.first_scheduled_ns)
            else:
                break
        for request_id in done:
            self.remove(request_id)
        return self._total_ns - begun_ns + max(0, begun_ns - (now - since))
