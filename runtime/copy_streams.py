"""How block copies are laid on a card's streams, so that the link works while steps compute.

Out: a kernel packs blocks into a buffer on the stream of the steps, which is quick; a stream beside it takes the buffer
over the link, and nothing waits for that. In: another stream beside it fills a buffer as soon as a step is queued,
while the steps before it still compute; the step waits for the buffer, and unpacks it. Buffers go round in a ring, each
with an event for when it may be filled again. A host block is not read before what was asked to be written there has
arrived, nor written before it was read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from policies.plan import CopyTimes

_Span = tuple[torch.cuda.Event, torch.cuda.Event]


def _elapsed_ns(spans: Iterable[_Span]) -> int:
    return round(sum(1e6 * begin.elapsed_time(end) for begin, end in spans))


@dataclass
class Copying:
    """One step's copies on the streams, and how long they took: known once the step has ended."""

    streams: CopyStreams
    into: list[_Span] = field(default_factory=list)
    waited: list[_Span] = field(default_factory=list)

    def times(self) -> CopyTimes:
        """After the step's end. Copies out may still be on their way then: they are counted with a later step's."""
        return CopyTimes(self.streams.ended_out_ns(), _elapsed_ns(self.into), _elapsed_ns(self.waited))


class CopyStreams:
    """Two streams beside the one that is current when `step` is called, and a ring of `num` buffers like `buffer`."""

    def __init__(self, buffer: Tensor, num: int) -> None:
        device = buffer.device
        self._buffers = [(buffer, torch.cuda.Event())]
        self._buffers += [(torch.empty_like(buffer), torch.cuda.Event()) for _ in range(num - 1)]
        self._next = 0
        self._streams = {out: torch.cuda.Stream(device) for out in (True, False)}
        torch.cuda.synchronize(device)
        self._touched: dict[bool, set[int]] = {True: set(), False: set()}  # host blocks that the other way waits for
        self._out: deque[_Span] = deque()  # not counted yet

    @contextmanager
    def step(self) -> Iterator[Copying]:
        """Copies of one step are queued inside, on the current stream and beside it."""
        copying = Copying(self)
        begin = _record(torch.cuda.current_stream())
        yield copying
        copying.waited.append((begin, _record(torch.cuda.current_stream())))

    def take_out(self, host: tuple[int, ...], pack: Callable[[Tensor], None], over: Callable[[Tensor], None]) -> None:
        """Pack blocks into a buffer between steps, and take it `over` to these host blocks beside them."""
        main, beside = torch.cuda.current_stream(), self._streams[True]
        buffer, free = self._take()
        main.wait_event(free)
        pack(buffer)
        beside.wait_stream(main)
        self._order(True, host)
        with torch.cuda.stream(beside):
            begin = _record(beside)
            over(buffer)
            self._out.append((begin, _record(beside)))
            free.record(beside)

    def bring_in(
        self, host: tuple[int, ...], over: Callable[[Tensor], None], unpack: Callable[[Tensor], None], copying: Copying
    ) -> None:
        """Fill a buffer from these host blocks beside the steps, and unpack it between them."""
        main, beside = torch.cuda.current_stream(), self._streams[False]
        buffer, free = self._take()
        beside.wait_event(free)
        self._order(False, host)
        with torch.cuda.stream(beside):
            begin = _record(beside)
            over(buffer)
            copying.into.append((begin, _record(beside)))
        main.wait_stream(beside)
        unpack(buffer)
        free.record(main)

    def _take(self) -> tuple[Tensor, torch.cuda.Event]:
        taken = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        return taken

    def _order(self, out: bool, host: tuple[int, ...]) -> None:
        """This way waits for the other where that still touches one of these host blocks."""
        others = self._touched[not out]
        if not others.isdisjoint(host):
            self._streams[out].wait_stream(self._streams[not out])
            others.clear()
        self._touched[out].update(host)

    def ended_out_ns(self) -> int:
        """Of the copies out that have ended and were not counted yet."""
        ended = []
        while self._out and self._out[0][1].query():
            ended.append(self._out.popleft())
        return _elapsed_ns(ended)

    def ready(self) -> Callable[[], None]:
        """What waits, on any thread, for all copies asked for until now."""
        events = [_record(stream) for stream in self._streams.values()]

        def wait() -> None:
            for event in events:
                event.synchronize()

        return wait

    def wait(self) -> None:
        """For all copies."""
        for stream in self._streams.values():
            stream.synchronize()


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event
