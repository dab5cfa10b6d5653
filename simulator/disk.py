"""A replica's disk: blocks are read and written one after another, in the order in which they were asked for.

One queue for both directions, as they share what the disk gives. That a block may have to wait for a step's copies
first is left out, and so is that a real disk works on several at once: a block's time is its part of that of many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from policies.plan import DiskCopy
from policies.replica_state import Limits


class Disk:
    """Times are those of the limits."""

    def __init__(self, limits: Limits) -> None:
        self._ns = {True: limits.disk_write_ns, False: limits.disk_read_ns}
        self._free = 0

    def ends(self, copies: Sequence[DiskCopy], now: int) -> Iterator[tuple[int, int]]:
        """(number, when it has arrived) of copies that are asked for now."""
        for copy in copies:
            self._free = max(self._free, now) + self._ns[copy.out]
            yield copy.number, self._free
