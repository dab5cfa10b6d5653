"""Routing of a mixture of experts: which experts a token goes to, and which tokens an expert gets.

A *pair* is one token at one of its experts: pair p is token p // top_k. Pairs are sorted by expert into blocks of rows
that share one expert's weights, as in MegaBlocks (Gale et al., arXiv:2211.15841): no pair is dropped. How many blocks
there are is known only on the device, so that there is room for the most there can be, and surplus blocks say so: a
captured CUDA graph stays right whatever the router says.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.launch import kernel, use_pdl


class Blocks(NamedTuple):
    """Pairs sorted by expert. All int32, on the device."""

    pairs: Tensor  # [blocks, BLOCK_M]; a number of no pair (there are too few) marks a row without one
    experts: Tensor  # [blocks]: whose pairs these are; -1 for a surplus block


def most_blocks(num_pairs: int, num_experts: int, block_m: int) -> int:
    """The most blocks that any routing of `num_pairs` needs: all experts hit, all but one with a pair too many."""
    hit = min(num_pairs, num_experts)
    return hit + (num_pairs - hit) // block_m


def route(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The `top_k` experts of each token, best first, and their softmax weights: logits [T, E] -> two of [T, top_k].

    Experts are int32; of equal logits the lower expert wins. Weights are float32, and with `renormalise` sum to one.
    """
    num_tokens, num_experts = logits.shape
    experts = torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
    pdl = use_pdl(logits.device)
    _route_kernel[(num_tokens,)](
        logits,
        experts,
        weights,
        num_experts,
        top_k,
        triton.next_power_of_2(num_experts),
        triton.next_power_of_2(top_k),
        renormalise,
        pdl,
        num_warps=1,
        launch_pdl=pdl,
    )
    return experts, weights


def align(experts: Tensor, num_experts: int, block_m: int) -> Blocks:
    """Sort the pairs of `experts` [T, top_k] by expert, each expert's padded to whole blocks of `block_m`."""
    num_pairs, device = experts.numel(), experts.device
    num_blocks = most_blocks(num_pairs, num_experts, block_m)
    pairs = torch.empty((num_blocks, block_m), dtype=torch.int32, device=device)
    block_experts = torch.empty(num_blocks, dtype=torch.int32, device=device)
    block_p = min(max(triton.next_power_of_2(num_pairs), 128), 4096)
    pdl = use_pdl(device)
    _align_kernel[(num_experts,)](
        experts,
        pairs,
        block_experts,
        num_pairs,
        num_blocks,
        num_experts,
        triton.next_power_of_2(num_experts),
        block_m,
        block_p,
        pdl,
        num_warps=4 if block_p <= 1024 else 8,
        launch_pdl=pdl,
    )
    return Blocks(pairs, block_experts)


@kernel
@triton.jit
def _route_kernel(
    logits,
    experts,
    weights,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a token: TOP_K times the best that is left."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK_E)
    places = tl.arange(0, BLOCK_K)
    row = tl.load(logits + token * NUM_EXPERTS + columns, columns < NUM_EXPERTS, float("-inf")).to(tl.float32)
    row = tl.where(row == row, row, float("-inf"))  # a padded row may hold NaN
    highest = tl.max(row, axis=0)
    left = row
    best = tl.zeros([BLOCK_K], tl.int32)
    scores = tl.full([BLOCK_K], float("-inf"), tl.float32)
    for place in tl.static_range(TOP_K):
        score, index = tl.max(left, axis=0, return_indices=True, return_indices_tie_break_left=True)
        # Where nothing is left but -inf, any column can win: keep it an expert's.
        best = tl.where(places == place, tl.minimum(index, NUM_EXPERTS - 1), best)
        scores = tl.where(places == place, score, scores)
        left = tl.where(columns == index, float("-inf"), left)
    scores = tl.exp(scores - highest)
    total = tl.sum(scores, axis=0) if RENORMALISE else tl.sum(tl.exp(row - highest), axis=0)
    tl.store(experts + token * TOP_K + places, best, places < TOP_K)
    tl.store(weights + token * TOP_K + places, scores / total, places < TOP_K)


@kernel
@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def _align_kernel(
    experts,
    sorted_pairs,
    block_experts,
    num_pairs,
    num_blocks,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """A counting sort, one program an expert: each counts all pairs, to know its place, and then collects its own."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.program_id(0)
    columns = tl.arange(0, BLOCK_E)
    offsets = tl.arange(0, BLOCK_P)
    counts = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, num_pairs, BLOCK_P):
        inside = start + offsets < num_pairs
        counts += tl.histogram(tl.load(experts + start + offsets, inside, 0), BLOCK_E, inside)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(columns < expert, blocks, 0), axis=0)
    mine = tl.sum(tl.where(columns == expert, blocks, 0), axis=0)

    base = sorted_pairs + first * BLOCK_M
    found = 0
    for start in range(0, num_pairs, BLOCK_P):
        pairs = start + offsets
        hits = (tl.load(experts + pairs, pairs < num_pairs, -1) == expert).to(tl.int32)
        tl.store(base + found + tl.cumsum(hits, axis=0) - 1, pairs, hits != 0)
        found += tl.sum(hits, axis=0)
    padding = found + tl.arange(0, BLOCK_M)
    tl.store(base + padding, num_pairs + tl.zeros([BLOCK_M], tl.int32), padding < mine * BLOCK_M)

    steps = tl.arange(0, 128)
    for start in range(first, first + mine, 128):
        tl.store(block_experts + start + steps, expert + tl.zeros([128], tl.int32), start + steps < first + mine)
    if expert == NUM_EXPERTS - 1:
        for start in range(first + mine, num_blocks, 128):
            tl.store(block_experts + start + steps, tl.full([128], -1, tl.int32), start + steps < num_blocks)
