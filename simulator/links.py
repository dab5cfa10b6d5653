"""A link between replicas: transfers under way share its bandwidth evenly, to the exact nanosecond.

Processor sharing: with n transfers under way each gets bandwidth / n. All of them get the same service, so one number
describes how far they are: the bytes that a transfer would have by now had it been there since the link was last idle.
A transfer ends when that number has grown by its bytes, so a heap of such numbers is all there is to keep. Times are
kept as fractions and rounded up to whole nanoseconds only where a transfer's end is told, so no rounding adds up.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from fractions import Fraction

NS = 10**9


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """Bytes a second in one direction (`math.inf`: no time at all), and nanoseconds from the last byte's leaving to the
    KV's being usable. `bytes_per_block`: of a KV block. Raises ValueError for what is no speed."""

    bandwidth: float
    bytes_per_block: int
    latency_ns: int = 0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise ValueError(f"a link's bandwidth must be above 0, not {self.bandwidth}")
        if self.latency_ns < 0 or self.bytes_per_block < 1:
            raise ValueError(f"latency must be at least 0 and a block at least a byte, not {self}")

    def transfer_ns(self, num_blocks: int) -> int:
        """How long so many KV blocks take on an idle link."""
        if not num_blocks:
            return 0
        if math.isinf(self.bandwidth):
            return self.latency_ns
        return self.latency_ns + math.ceil(num_blocks * self.bytes_per_block * NS / Fraction(self.bandwidth))


class Link:
    """Transfers by number, all of the same speed. Times never go back. O(log n) a start and an end."""

    def __init__(self, bandwidth: float) -> None:
        self._infinite = math.isinf(bandwidth)
        self._per_ns = Fraction(0 if self._infinite else bandwidth) / NS
        self._served = Fraction(0)
        self._at = Fraction(0)
        self._ends: list[tuple[Fraction, int]] = []  # (served at which it ends, transfer)
        self._cancelled: set[int] = set()
        self._num = 0

    def start(self, transfer: int, num_bytes: int, now: int) -> None:
        """Ends before now must have been taken by `ended`."""
        self._advance(Fraction(now))
        if not self._num:
            self._served = Fraction(0)  # keeps the fractions small
        heapq.heappush(self._ends, (self._served + (0 if self._infinite else num_bytes), transfer))
        self._num += 1

    def cancel(self, transfer: int, now: int) -> None:
        """The others have its share from now on."""
        self._advance(Fraction(now))
        self._cancelled.add(transfer)
        self._num -= 1
        self._forget_cancelled()

    def next_end(self) -> int | None:
        """When the next transfer ends if nothing else happens, rounded up."""
        return math.ceil(self._next()) if self._ends else None

    def ended(self, now: int) -> list[int]:
        """The transfers that have ended by now, in order of their ends, equal ones by number. Each is told once."""
        done = []
        while self._ends and (at := self._next()) <= now:
            self._advance(at)
            done.append(heapq.heappop(self._ends)[1])
            self._num -= 1
            self._forget_cancelled()
        self._advance(Fraction(now))
        return done

    def _next(self) -> Fraction:
        left = self._ends[0][0] - self._served
        return self._at + (left * self._num / self._per_ns if left else 0)

    def _advance(self, now: Fraction) -> None:
        if self._num and not self._infinite:
            self._served += (now - self._at) * self._per_ns / self._num
        self._at = now

    def _forget_cancelled(self) -> None:
        while self._ends and self._ends[0][1] in self._cancelled:
            self._cancelled.discard(heapq.heappop(self._ends)[1])
