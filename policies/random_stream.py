"""Counter-based random numbers: a draw is a pure function of (seed, name, request id, counter).

Nothing is advanced by drawing, so the order of the draws, the number of requests and the number of
processes change nobody's values: that is what lets one policy object decide the same in the runtime and in
the simulation.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3",
SC 2011). Its 64-bit key is a BLAKE2b digest of (seed, name). Its 128-bit input block is (counter, request
id), 64 bits each: a non-negative integer id is used as it is, so that integer ids never collide; a string
id enters as its 64-bit BLAKE2b digest. Each block gives 128 bits, of which the first 64 are the draw. Only
integer arithmetic is used, so every platform gives the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

_MASK32 = 0xFFFFFFFF
_LIMIT64 = 1 << 64
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_TO_UNIT = 2.0**-53


def philox4x32(block: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One Philox4x32-10 block: four 32-bit words and a key of two 32-bit words -> four 32-bit words."""
    c0, c1, c2, c3 = block
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0 = _MULTIPLIERS[0] * c0
        p1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK32
        k0 = (k0 + _WEYL[0]) & _MASK32
        k1 = (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def philox4x32_array(
    block: tuple[UInt64Array, UInt64Array, UInt64Array, UInt64Array], key: tuple[int, int]
) -> tuple[UInt64Array, UInt64Array, UInt64Array, UInt64Array]:
    """`philox4x32` over arrays that broadcast together; every word is held in a uint64 below 2**32."""
    c0, c1, c2, c3 = block
    k0, k1 = key
    mask, half = np.uint64(_MASK32), np.uint64(32)
    for _ in range(_ROUNDS):
        p0 = np.uint64(_MULTIPLIERS[0]) * c0
        p1 = np.uint64(_MULTIPLIERS[1]) * c2
        c0, c1 = (p1 >> half) ^ c1 ^ np.uint64(k0), p1 & mask
        c2, c3 = (p0 >> half) ^ c3 ^ np.uint64(k1), p0 & mask
        k0 = (k0 + _WEYL[0]) & _MASK32
        k1 = (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


class RandomStream:
    """The random numbers of one named purpose ("power-of-two", "sampling", ...) under one seed.

    Args:
        seed: any integer, also a negative one.
        name: what the numbers are for; two names under one seed give unrelated numbers.
    """

    __slots__ = ("_key", "name", "seed")

    def __init__(self, seed: int, name: str) -> None:
        self.seed = int(seed)
        self.name = name
        # The seed's digits hold no colon, so the pair cannot be read in two ways.
        digest = _digest64(f"{self.seed}:{name}", b"diptych.stream")
        self._key = (digest & _MASK32, digest >> 32)

    def __repr__(self) -> str:
        return f"RandomStream(seed={self.seed}, name={self.name!r})"

    def uint64(self, request_id: int | str, counter: int = 0) -> int:
        """The draw `counter` of `request_id`: an integer in [0, 2**64).

        Raises:
            ValueError: if the counter or an integer id lies outside [0, 2**64).
        """
        number = _id_number(request_id)
        _check_range("counter", counter)
        block = (counter & _MASK32, counter >> 32, number & _MASK32, number >> 32)
        low, high, _, _ = philox4x32(block, self._key)
        return high << 32 | low

    def uniform(self, request_id: int | str, counter: int = 0) -> float:
        """The same draw as a float in [0, 1), a multiple of 2**-53."""
        return (self.uint64(request_id, counter) >> 11) * _TO_UNIT

    def below(self, bound: int, request_id: int | str, counter: int = 0) -> int:
        """The same draw as an integer in [0, bound); no value is favoured by more than bound / 2**64.

        Raises:
            ValueError: if bound is not in [1, 2**32].
        """
        if not 1 <= bound <= 1 << 32:
            raise ValueError(f"bound must be in [1, 2**32], got {bound}")
        return (self.uint64(request_id, counter) * bound) >> 64

    def uint64_array(self, request_ids: Any, counters: Any = 0) -> UInt64Array:
        """`uint64` over arrays: ids and counters broadcast together, element by element the scalar draw.

        Args:
            request_ids: an id, a sequence of ids, or an integer array of ids.
            counters: an integer or an integer array.
        """
        ids = _id_array(request_ids)
        steps = _to_uint64("counter", counters)
        mask, half = np.uint64(_MASK32), np.uint64(32)
        block = (steps & mask, steps >> half, ids & mask, ids >> half)
        low, high, _, _ = philox4x32_array(block, self._key)
        return np.asarray(high << half | low, dtype=np.uint64)

    def uniform_array(self, request_ids: Any, counters: Any = 0) -> npt.NDArray[np.float64]:
        """`uniform` over arrays, with the shapes of `uint64_array`."""
        bits = self.uint64_array(request_ids, counters) >> np.uint64(11)
        return np.asarray(bits.astype(np.float64) * _TO_UNIT)


def _digest64(text: str, person: bytes) -> int:
    # surrogatepass: an id that came from outside may hold a lone surrogate, and must still have a number.
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=person).digest(), "little")


def _check_range(what: str, value: int) -> None:
    if not 0 <= value < _LIMIT64:
        raise ValueError(f"{what} must be in [0, 2**64), got {value}")


def _id_number(request_id: int | str) -> int:
    if isinstance(request_id, str):
        return _digest64(request_id, b"diptych.request")
    number = int(request_id)
    _check_range("request id", number)
    return number


def _id_array(request_ids: Any) -> UInt64Array:
    if isinstance(request_ids, (str, int)):
        return np.asarray(_id_number(request_ids), dtype=np.uint64)
    if isinstance(request_ids, np.ndarray):
        return _to_uint64("request id", request_ids)
    ids: Sequence[int | str] = request_ids
    return np.fromiter((_id_number(i) for i in ids), dtype=np.uint64, count=len(ids))


def _to_uint64(what: str, values: Any) -> UInt64Array:
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what} must be an integer in [0, 2**64), got an array of {array.dtype}")
    if array.dtype.kind == "i" and array.size and int(array.min()) < 0:
        raise ValueError(f"{what} must be in [0, 2**64), got {int(array.min())}")
    return array.astype(np.uint64)
