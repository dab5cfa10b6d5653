"""Counter-based noise in tensor arithmetic: one Gumbel variable for each (key, position, token id).

Why Gumbel noise and not one uniform number and an inverse CDF. Both sample exactly. The inverse CDF moves
when any logit before the chosen one moves: over N equally likely tokens, rounding noise of size d in the
logits changes the token with probability about d * sqrt(N). argmax(logits + Gumbel) changes only when the
best two are within d, with probability about d. Logits do carry such noise, since a matrix product rounds
differently for different batch shapes; so Gumbel noise is what keeps a request's tokens its own. It also
needs no sort and no running sum.

Why not the framework's generator: its values depend on the tensor's shape and the row's place in it. Here
they are a
function of (key, position, token id) alone, with the same bits on every device:

    row bits  b = splitmix64(key + (position + 1) * GAMMA)                   64 bits a row
    entry     x = mix32((mix32(token id) + low32(b)) * (high32(b) | 1))      32 bits an entry
    uniform   u = ((x mod 2**31) + 1/2) / 2**31                              in (0, 1)
    Gumbel    g = -log(-log(1 - u))

SplitMix64 is from Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014); mix32
is the "lowbias32" integer hash found by Wellons' hash-prospector (2018). -log(1 - u) keeps its relative
precision for small u, which are the draws that win, so a token's probability is right to about 2**-31.

Products of signed integers wrap modulo 2**32 or 2**64 in torch on CPU and CUDA alike, as unsigned ones would.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


_GAMMA = _signed(0x9E3779B97F4A7C15, 64)
_MIX64 = (_signed(0xBF58476D1CE4E5B9, 64), _signed(0x94D049BB133111EB, 64))
_MIX32 = (_signed(0x7FEB352D, 32), _signed(0x846CA68B, 32))
_BELOW_ONE = 1.0 - 2.0**-24


def row_bits(keys: Tensor, positions: Tensor) -> Tensor:
    """64 random bits a row from int64 keys [R] and output positions [R] -> int64 [R]."""
    z = keys + (positions + 1) * _GAMMA
    z = (z ^ _shift_right(z, 30, 64)) * _MIX64[0]
    z = (z ^ _shift_right(z, 27, 64)) * _MIX64[1]
    return z ^ _shift_right(z, 31, 64)


def vocab_hash(vocab_size: int, device: torch.device) -> Tensor:
    """mix32 of every token id: int32 [V], computed once."""
    ids = torch.from_numpy(np.arange(vocab_size, dtype=np.int32))
    return _mix32_(ids).to(device)


def gumbel(bits: Tensor, hashed_vocab: Tensor) -> Tensor:
    """Gumbel noise, float32 [R, V], from `row_bits` [R] and `vocab_hash` [V]. Every value is finite."""
    halves = bits.view(torch.int32).view(-1, 2)  # low, high: every supported platform is little-endian
    x = hashed_vocab + halves[:, :1]
    x.mul_(halves[:, 1:] | 1)
    _mix32_(x).bitwise_and_(0x7FFFFFFF)
    # The clamp: the largest x round to 1 in float32, whose noise would be -inf and hide a row's only
    # candidate.
    u = x.to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=_BELOW_ONE)
    return u.neg_().log1p_().neg_().log_().neg_()


def _shift_right(x: Tensor, count: int, bits: int) -> Tensor:
    """Logical shift; torch shifts signed integers arithmetically, so the copied sign bits are masked off."""
    return (x >> count).bitwise_and_((1 << (bits - count)) - 1)


def _mix32_(x: Tensor) -> Tensor:
    """lowbias32 on int32, in place."""
    x.bitwise_xor_(_shift_right(x, 16, 32)).mul_(_MIX32[0])
    x.bitwise_xor_(_shift_right(x, 15, 32)).mul_(_MIX32[1])
    return x.bitwise_xor_(_shift_right(x, 16, 32))
