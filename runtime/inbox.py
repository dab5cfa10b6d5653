"""What other threads tell the engine's: the only thing that both touch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from policies.control_plane import ControlPlane
from runtime.sequence import Sequence

LOOK_NS = 1_000_000
"""How often the engine looks, while it holds a plan back, whether the step in flight has ended already."""

Answer = TypeVar("Answer")


class Call(Generic[Answer]):
    """A function that waits for the engine's thread, and its answer."""

    def __init__(self, function: Callable[[ControlPlane, int], Answer]) -> None:
        self._function = function
        self.future: Future[Answer] = Future()

    def run(self, plane: ControlPlane, now: int) -> None:
        try:
            self.future.set_result(self._function(plane, now))
        except Exception as error:
            self.future.set_exception(error)


@dataclass(slots=True)
class Mail:
    """What has come since the inbox was emptied last, each kind in the order in which it came."""

    submitted: list[Sequence] = field(default_factory=list)
    ends: list[tuple[int, int | None]] = field(default_factory=list)
    """Request id; output tokens where a stop string ended it, else None: it is cancelled."""
    calls: list[Call[Any]] = field(default_factory=list)
    from_disk: list[tuple[int, str]] = field(default_factory=list)
    """Number of an operation; what went wrong with it, or nothing."""

    def __bool__(self) -> bool:
        return bool(self.submitted or self.ends or self.calls or self.from_disk)


class Inbox:
    """Wakes the engine's thread when anything comes. `with inbox:` keeps the others out, for several steps in one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._mail = Mail()
        self._alarm = False
        self.closing = False
        """Whether the engine is to stop, or has stopped."""

    def __enter__(self) -> Inbox:
        self._changed.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._changed.release()

    def submit(self, sequences: SequenceOf[Sequence]) -> None:
        with self._changed:
            self._mail.submitted += sequences
            self._changed.notify()

    def end(self, request_id: int, stopped_after: int | None = None) -> None:
        """End a request: after so many output tokens, by a stop string; None: it is cancelled."""
        with self._changed:
            self._mail.ends.append((request_id, stopped_after))
            self._changed.notify()

    def call(self, call: Call[Any]) -> None:
        with self._changed:
            self._mail.calls.append(call)
            self._changed.notify()

    def disk_done(self, number: int, error: str) -> None:
        """An operation of the disk tier is over; `error` is empty where it went well."""
        with self._changed:
            self._mail.from_disk.append((number, error))
            self._changed.notify()

    def alarm(self) -> None:
        """The model's other ranks are to be looked at."""
        with self._changed:
            self._alarm = True
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self.closing = True
            self._changed.notify()

    # For the engine's thread

    def take(self) -> Mail:
        with self._changed:
            mail, self._mail = self._mail, Mail()
        return mail

    def wait(self, timeout_s: float) -> None:
        """Return as soon as there is anything to do, or after so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._mail or self.closing or self._alarm, timeout_s)

    def hold(self, until_ns: int, over: Callable[[], bool]) -> None:
        """Return at a time of `time.monotonic_ns`, sooner when the engine closes or `over()`; what comes waits."""
        with self._changed:
            while (left := until_ns - time.monotonic_ns()) > 0 and not (self.closing or over()):
                self._changed.wait(min(left, LOOK_NS) / 1e9)
