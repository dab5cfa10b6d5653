"""How a peer that is frozen, or cut off, is told from one that has nothing to say.

The front asks every engine for a sign of life (`messages.Ping`) once a second, and hears it from the thread that takes
messages, so that a long step is none of its business. Whoever hears nothing for too long gives the other one up: the
front the engine, and the host of an engine its front.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PING_SECONDS = 1.0
MIN_TIMEOUT_SECONDS = 2.0
TIMEOUT_SECONDS = 10.0
"""By default. Threads of Python may have to wait for one another, a machine may be overloaded, a network slow."""


def check_timeout(seconds: float) -> None:
    """Raises ValueError for a time in which a peer that is well could be silent."""
    if seconds < MIN_TIMEOUT_SECONDS:
        raise ValueError(f"the heartbeat's timeout must be {MIN_TIMEOUT_SECONDS:g} s or more, not {seconds:g}")


class Heartbeat:
    """One peer's signs of life.

    Args:
        timeout_s: seconds of silence after which the peer is given up.
        ping: asks it for a sign of life; None: it speaks up by itself.
    """

    def __init__(self, timeout_s: float, ping: Callable[[], None] | None = None) -> None:
        check_timeout(timeout_s)
        self.timeout_s = timeout_s
        self._ping = ping
        self._num_heard = 0

    def heard(self) -> None:
        """Something has come from the peer. With the first thing its time begins to run: it has been starting."""
        self._num_heard += 1

    async def stops(self) -> None:
        """Returns once the peer has been silent for too long.

        It counts its own turns instead of looking at a clock: after this process itself has been stopped for a while,
        what has come meanwhile is read before the peer is blamed.
        """
        silent = 0
        while silent * PING_SECONDS < self.timeout_s:
            before = self._num_heard
            if self._ping is not None:
                self._ping()
            await asyncio.sleep(PING_SECONDS)
            silent = silent + 1 if before and self._num_heard == before else 0
