"""The replicas' links in simulated time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import simpy

from simulator.links import Link, LinkSpeed


@dataclass(eq=False, slots=True)
class Sending:
    """KV blocks on their way. `done` succeeds with True once they have arrived, with False once they will not."""

    number: int
    source: int
    target: int
    done: simpy.Event
    left: bool = False  # the last byte has


class Network:
    """One link a replica, which all that it sends shares. What a replica receives is not limited."""

    def __init__(self, env: simpy.Environment, speeds: Iterable[LinkSpeed] = ()) -> None:
        self._env = env
        self._speeds: list[LinkSpeed] = []
        self._links: list[Link] = []
        self._cut: dict[int, None] = {}  # replicas whose links are down
        for speed in speeds:
            self.add(speed)
        self._sending: dict[int, Sending] = {}
        self._count = 0

    def add(self, speed: LinkSpeed) -> None:
        """The link of one more replica."""
        self._speeds.append(speed)
        self._links.append(Link(speed.bandwidth))

    def send(self, source: int, target: int, num_blocks: int) -> Sending:
        """Start sending. No blocks take no time."""
        self._count += 1
        sending = Sending(self._count, source, target, self._env.event())
        if source in self._cut or not num_blocks:
            sending.done.succeed(source not in self._cut)
            return sending
        self._sending[sending.number] = sending
        self._take_ended(source)
        now = int(self._env.now)
        self._links[source].start(sending.number, num_blocks * self._speeds[source].bytes_per_block, now)
        self._watch(source)
        return sending

    def abort(self, sending: Sending) -> None:
        """Send no more of it; without effect once it has arrived."""
        self._take_ended(sending.source)
        if self._sending.pop(sending.number, None) is not None:
            sending.done.succeed(False)
            if not sending.left:
                self._links[sending.source].cancel(sending.number, int(self._env.now))
        self._watch(sending.source)  # for the others: what was due now has been taken

    def fail(self, replica: int) -> None:
        """Nothing that is on its way from or to this replica arrives."""
        for sending in [s for s in self._sending.values() if replica in (s.source, s.target)]:
            self.abort(sending)

    def cut(self, replica: int) -> None:
        """The link of this replica is down: nothing that it sends arrives, now or from what is on its way."""
        self._cut[replica] = None
        for sending in [s for s in self._sending.values() if s.source == replica]:
            self.abort(sending)

    def mend(self, replica: int) -> None:
        """It is up again."""
        self._cut.pop(replica, None)

    def _watch(self, source: int) -> None:
        """Look again when the next transfer should end. Should another one start meanwhile, that is for nothing."""
        at = self._links[source].next_end()
        if at is not None:
            self._after(at - int(self._env.now), lambda: self._look(source))

    def _look(self, source: int) -> None:
        if self._take_ended(source):
            self._watch(source)

    def _take_ended(self, source: int) -> bool:
        """See to those whose last byte has left; whether there were any."""
        ended = [self._sending[number] for number in self._links[source].ended(int(self._env.now))]
        for sending in ended:
            sending.left = True
            if self._speeds[source].latency_ns:
                self._after(self._speeds[source].latency_ns, functools.partial(self._arrive, sending))
            else:
                self._arrive(sending)
        return bool(ended)

    def _arrive(self, sending: Sending) -> None:
        if self._sending.pop(sending.number, None) is not None:  # else it was aborted
            sending.done.succeed(True)

    def _after(self, delay_ns: int, do: Callable[[], None]) -> None:
        callbacks = self._env.timeout(delay_ns).callbacks
        assert callbacks is not None
        callbacks.append(lambda _: do())
