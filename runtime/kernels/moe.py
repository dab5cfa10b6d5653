"""The experts of a mixture-of-experts layer (Shazeer et al., arXiv:1701.06538), with no host synchronisation.

    route -> align -> gate and up, silu(gate) * up -> down, times the routing weight -> sum over a token's pairs

What pairs and blocks are is said in `runtime.kernels.moe_routing`. Grids have room for the most blocks there can be;
programs of surplus ones leave at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.launch import kernel, use_pdl
from runtime.kernels.moe_routing import Blocks, align, route


class Tile(NamedTuple):
    """Sizes of a grouped product's programs: BLOCK_M pairs by so many columns, in steps of `block_k`."""

    block_m: int
    gate_n: int  # columns of the gate, and as many of up beside them
    down_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Few rows an expert: time is that of reading weights, narrow tiles spread them over the card. Many: tensor cores.
_FEW = Tile(16, 32, 64, 128, 4, 4)
_SOME = Tile(64, 64, 128, 64, 4, 4)
_MANY = Tile(128, 128, 128, 64, 8, 3)
_FLOAT32 = Tile(16, 32, 32, 32, 4, 3)  # for checking: no tensor cores, and twice the bytes


def choose_tile(num_pairs: int, num_experts: int, dtype: torch.dtype) -> Tile:
    """A fixed rule on the expected number of pairs an expert."""
    if dtype == torch.float32:
        return _FLOAT32
    expected = num_pairs / num_experts
    return _FEW if expected <= 12 else _SOME if expected <= 96 else _MANY


def experts_mlp(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, top_k: int, renormalise: bool) -> Tensor:
    """The experts' MLPs of each token, weighted by the router and summed: x [T, H] -> [T, H].

    `logits` [T, E] are the router's, `gate_up` [E, 2 I, H] has each expert's gate in front of its up, `down` is
    [E, H, I]; all contiguous. H and I must be multiples of 16. Products are accumulated in float32; what is stored
    between the kernels has the type of x. Raises ValueError for other sizes.
    """
    num_tokens, num_experts = logits.shape
    if num_tokens == 0:
        return torch.empty_like(x)
    experts, weights = route(logits, top_k, renormalise)
    num_pairs = num_tokens * top_k
    tile = choose_tile(num_pairs, num_experts, x.dtype)
    # With so few pairs next to no two share an expert: each is a block of its own, and sorting would gain nothing.
    blocks = None if num_pairs * 4 <= num_experts or num_tokens == 1 else align(experts, num_experts, tile.block_m)
    inner = gate_up_silu(x, gate_up, experts, blocks, tile)
    return sum_pairs(down_weighted(inner, down, weights, experts, blocks, tile))


def gate_up_silu(x: Tensor, gate_up: Tensor, experts: Tensor, blocks: Blocks | None, tile: Tile) -> Tensor:
    """silu(gate) * up of each pair: x [T, H], gate_up [E, 2 I, H], experts [T, top_k] -> [T * top_k, I].

    Without `blocks` each pair is computed alone.
    """
    num_pairs, top_k = experts.numel(), experts.shape[1]
    hidden, inner = x.shape[1], gate_up.shape[1] // 2
    out = torch.empty((num_pairs, inner), dtype=x.dtype, device=x.device)
    block_n = _divisor(inner, tile.gate_n)
    pairs, block_experts = blocks or Blocks(experts, experts)
    pdl = use_pdl(x.device)
    _gate_up_kernel[(inner // block_n, block_experts.numel())](
        x,
        gate_up,
        pairs,
        block_experts,
        out,
        num_pairs,
        top_k,
        hidden,
        inner,
        blocks is not None,
        tile.block_m,
        block_n,
        _divisor(hidden, tile.block_k),
        x.device.type == "cpu",
        pdl,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=pdl,
    )
    return out


def down_weighted(
    inner: Tensor, down: Tensor, weights: Tensor, experts: Tensor, blocks: Blocks | None, tile: Tile
) -> Tensor:
    """Each pair's output times its routing weight: inner [T * top_k, I], down [E, H, I] -> [T, top_k, H]."""
    num_pairs, size = inner.shape
    hidden = down.shape[1]
    out = torch.empty((*weights.shape, hidden), dtype=inner.dtype, device=inner.device)
    block_n = _divisor(hidden, tile.down_n)
    pairs, block_experts = blocks or Blocks(experts, experts)
    pdl = use_pdl(inner.device)
    _down_kernel[(hidden // block_n, block_experts.numel())](
        inner,
        down,
        weights,
        pairs,
        block_experts,
        out,
        num_pairs,
        hidden,
        size,
        blocks is not None,
        tile.block_m,
        block_n,
        _divisor(size, tile.block_k),
        inner.device.type == "cpu",
        pdl,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=pdl,
    )
    return out


def sum_pairs(outputs: Tensor) -> Tensor:
    """Sum over each token's experts, in float32, always in the same order: [T, top_k, H] -> [T, H]."""
    num_tokens, top_k, hidden = outputs.shape
    out = torch.empty((num_tokens, hidden), dtype=outputs.dtype, device=outputs.device)
    block = _divisor(hidden, 512)
    pdl = use_pdl(outputs.device)
    _sum_kernel[(hidden // block, num_tokens)](
        outputs, out, top_k, hidden, block, pdl, num_warps=max(block // 256, 1), launch_pdl=pdl
    )
    return out


def _divisor(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides `size`. Raises ValueError when it is below 16."""
    divisor = min(size & -size, most)
    if divisor < 16:
        raise ValueError(f"the fused experts need sizes that are multiples of 16, not {size}; use the reference path")
    return divisor


@kernel
@triton.jit(do_not_specialize=["num_pairs"])
def _gate_up_kernel(
    x,
    weight,
    sorted_pairs,
    block_experts,
    out,
    num_pairs,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program for BLOCK_N columns of gate and the same of up, of one block of pairs."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    block = tl.program_id(1)
    expert = tl.load(block_experts + block)
    if expert < 0:
        return
    rows = tl.arange(0, BLOCK_M)
    pairs = tl.load(sorted_pairs + block * BLOCK_M + rows) if SORTED else tl.where(rows == 0, block, num_pairs)
    valid = (pairs < num_pairs)[:, None]
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x += (pairs // TOP_K).to(tl.int64)[:, None] * HIDDEN + inner[None, :]
    weight += expert.to(tl.int64) * (2 * INNER * HIDDEN) + (columns * HIDDEN)[None, :] + inner[:, None]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        tokens = tl.load(x + start, valid, 0.0)
        gate_weight = tl.load(weight + start)
        up_weight = tl.load(weight + (INNER * HIDDEN + start))
        if INTERPRETED:  # whose products know no bfloat16
            tokens, gate_weight, up_weight = tokens.to(tl.float32), gate_weight.to(tl.float32), up_weight.to(tl.float32)
        gate = tl.dot(tokens, gate_weight, gate, input_precision="ieee")
        up = tl.dot(tokens, up_weight, up, input_precision="ieee")
    result = gate * tl.sigmoid(gate) * up
    out += pairs.to(tl.int64)[:, None] * INNER + columns[None, :]
    tl.store(out, result.to(out.dtype.element_ty), valid)


@kernel
@triton.jit(do_not_specialize=["num_pairs"])
def _down_kernel(
    x,
    weight,
    routing_weights,
    sorted_pairs,
    block_experts,
    out,
    num_pairs,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program for BLOCK_N columns of the output of one block of pairs."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    block = tl.program_id(1)
    expert = tl.load(block_experts + block)
    if expert < 0:
        return
    rows = tl.arange(0, BLOCK_M)
    pairs = tl.load(sorted_pairs + block * BLOCK_M + rows) if SORTED else tl.where(rows == 0, block, num_pairs)
    valid = pairs < num_pairs
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x += pairs.to(tl.int64)[:, None] * INNER + inner[None, :]
    weight += expert.to(tl.int64) * (HIDDEN * INNER) + (columns * INNER)[None, :] + inner[:, None]
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, INNER, BLOCK_K):
        gated = tl.load(x + start, valid[:, None], 0.0)
        down = tl.load(weight + start)
        if INTERPRETED:
            gated, down = gated.to(tl.float32), down.to(tl.float32)
        result = tl.dot(gated, down, result, input_precision="ieee")
    result *= tl.load(routing_weights + pairs, valid, 0.0)[:, None]
    out += pairs.to(tl.int64)[:, None] * HIDDEN + columns[None, :]
    tl.store(out, result.to(out.dtype.element_ty), valid[:, None])


@kernel
@triton.jit
def _sum_kernel(outputs, out, TOP_K: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program for BLOCK columns of one token."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(TOP_K):
        total += tl.load(outputs + (token * TOP_K + place) * HIDDEN + columns).to(tl.float32)
    tl.store(out + token * HIDDEN + columns, total.to(out.dtype.element_ty))
