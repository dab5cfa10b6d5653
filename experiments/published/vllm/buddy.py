"""Orca's reservations as the paper's baselines place them."""

from __future__ import annotations

from policies.admission.reserve_oracle import ReserveOracle
from policies.admission.reserve_pow2 import ReservePow2
from policies.request import Request


class BuddyOracle(ReserveOracle):
    """The true length, in one piece from a buddy allocator, whose pieces are powers of two."""

    def most(self, request: Request) -> int:
        return _piece(super().most(request))


class BuddyPow2(ReservePow2):
    """The output rounded up to a power of two, in one piece from a buddy allocator."""

    def most(self, request: Request) -> int:
        return _piece(super().most(request))


def _piece(tokens: int) -> int:
    return 1 << (tokens - 1).bit_length()
