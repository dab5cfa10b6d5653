"""What lies between the q, k, v product and attention, in one launch: head norms, rotary embedding, cache write.

Rotary embedding: Su et al., arXiv:2104.09864, with the two halves of a head paired. Head norms: Qwen3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.launch import kernel, use_pdl

_HEADS = 8  # in a block: a 16-byte load of each half of a head of 128 for each thread of two warps
_MANY_ROWS = 1024  # from here on rows alone fill the card, and one program takes all heads of a row


def rotary_and_cache(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Rotates q and k, stores k and v in the cache, and returns q, [T, num_heads, head_dim].

    A cache of float8_e4m3fn takes values rounded to qkv's type first, saturated to the largest it can hold.

    Args:
        qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], q in front of k in front of v; rows may be spaced.
        positions: int64 [T], rows of `cos` and `sin`, float32 [max_len, head_dim / 2].
        slot_mapping: int64 [T]; nothing is written for a row whose slot is -1.
        key_cache: like `value_cache` [num_slots, num_kv_heads, head_dim], contiguous.
        q_norm: like `k_norm` [head_dim], the weight of an RMS norm of each head before the rotation, or None.
    """
    rows = qkv.shape[0]
    query = torch.empty((rows, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if not rows:
        return query
    heads = min(_HEADS, triton.next_power_of_2(max(num_heads, num_kv_heads)))
    groups = triton.cdiv(num_heads, heads) + 2 * triton.cdiv(num_kv_heads, heads)
    half = triton.next_power_of_2(head_dim // 2)
    pdl = use_pdl(qkv.device)
    _rotary_kernel[(rows, 1 if rows >= _MANY_ROWS else groups)](
        qkv,
        qkv.stride(0),
        positions,
        cos,
        sin,
        slot_mapping,
        key_cache,
        value_cache,
        query,
        query if q_norm is None else q_norm,
        query if k_norm is None else k_norm,
        num_heads,
        num_kv_heads,
        head_dim,
        eps,
        q_norm is not None,
        heads,
        half,
        pdl,
        num_warps=min(max(heads * half // 256, 1), 4),
        launch_pdl=pdl,
    )
    return query


@kernel
@triton.jit
def _rotary_kernel(
    qkv: tl.tensor,
    row_stride: tl.tensor,
    positions: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slot_mapping: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    query: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    EPS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Groups of HEADS heads of one row, each wholly of q, of k or of v; grid axis 1 shares the groups out."""
    if PDL:
        gdc_launch_dependents()
    PAIRS: tl.constexpr = HEAD_DIM // 2
    QUERY_GROUPS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    KV_GROUPS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    pair = tl.arange(0, HALF)[None, :]
    in_head = pair < PAIRS
    if PDL:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    angle = tl.load(positions + row) * PAIRS + pair
    cosine = tl.load(cos + angle, in_head, 0.0)
    sine = tl.load(sin + angle, in_head, 0.0)
    slot = tl.load(slot_mapping + row)
    qkv_row = qkv + row * row_stride
    for group in range(tl.program_id(1), QUERY_GROUPS + 2 * KV_GROUPS, tl.num_programs(1)):
        if group < QUERY_GROUPS:
            head = group * HEADS + tl.arange(0, HEADS)[:, None]
            at = head * HEAD_DIM + pair
            mask = (head < NUM_HEADS) & in_head
            first, second = _rotate(qkv_row + at, mask, cosine, sine, q_norm + pair, in_head, HEAD_DIM, EPS, HAS_NORM)
            target = query + row * (NUM_HEADS * HEAD_DIM) + at
            tl.store(target, first, mask)
            tl.store(target + PAIRS, second, mask)
        elif slot >= 0:
            slot_start = slot * (NUM_KV_HEADS * HEAD_DIM)
            if group < QUERY_GROUPS + KV_GROUPS:
                head = (group - QUERY_GROUPS) * HEADS + tl.arange(0, HEADS)[:, None]
                at = head * HEAD_DIM + pair
                mask = (head < NUM_KV_HEADS) & in_head
                source = qkv_row + NUM_HEADS * HEAD_DIM + at
                first, second = _rotate(source, mask, cosine, sine, k_norm + pair, in_head, HEAD_DIM, EPS, HAS_NORM)
                _store_cache(key_cache + slot_start + at, first, second, mask, PAIRS)
            else:
                head = (group - QUERY_GROUPS - KV_GROUPS) * HEADS + tl.arange(0, HEADS)[:, None]
                at = head * HEAD_DIM + pair
                mask = (head < NUM_KV_HEADS) & in_head
                source = qkv_row + (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM + at
                first, second = tl.load(source, mask, 0.0), tl.load(source + PAIRS, mask, 0.0)
                _store_cache(value_cache + slot_start + at, first, second, mask, PAIRS)


@triton.jit
def _rotate(
    source: tl.tensor,
    mask: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    weight: tl.tensor,
    weight_mask: tl.tensor,
    HEAD_DIM: tl.constexpr,
    EPS: tl.constexpr,
    HAS_NORM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The two rotated halves of heads whose first halves are at `source`, in the source's type."""
    dtype: tl.constexpr = source.dtype.element_ty
    first = tl.load(source, mask, 0.0).to(tl.float32)
    second = tl.load(source + HEAD_DIM // 2, mask, 0.0).to(tl.float32)
    if HAS_NORM:
        square = tl.sum(first * first + second * second, axis=1, keep_dims=True)
        inverse_rms = tl.rsqrt(square / HEAD_DIM + EPS)
        first_weight = tl.load(weight, weight_mask, 0.0).to(tl.float32)
        second_weight = tl.load(weight + HEAD_DIM // 2, weight_mask, 0.0).to(tl.float32)
        # Rounded as a norm of its own would leave it, so that both paths store the same keys.
        first = (first * inverse_rms * first_weight).to(dtype).to(tl.float32)
        second = (second * inverse_rms * second_weight).to(dtype).to(tl.float32)
    return (first * cosine - second * sine).to(dtype), (second * cosine + first * sine).to(dtype)


@triton.jit
def _store_cache(target: tl.tensor, first: tl.tensor, second: tl.tensor, mask: tl.tensor, PAIRS: tl.constexpr) -> None:
    dtype: tl.constexpr = target.dtype.element_ty
    if dtype == tl.float8e4nv:
        first = tl.clamp(first.to(tl.float32), -448.0, 448.0)
        second = tl.clamp(second.to(tl.float32), -448.0, 448.0)
    tl.store(target, first.to(dtype), mask)
    tl.store(target + PAIRS, second.to(dtype), mask)
