"""The rows of a table that is split over ranks by its rows: zeros for what another rank has."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.launch import kernel, use_pdl

_MAX_BLOCK = 2048


def embed_part(ids: Tensor, table: Tensor, start: int, count: int) -> Tensor:
    """Row `id - start` of the table [rows, H] where that is among the first `count`, else zeros: ids [T] -> [T, H]."""
    rows, hidden = len(ids), table.shape[1]
    out = torch.empty((rows, hidden), dtype=table.dtype, device=table.device)
    if rows:
        block = min(triton.next_power_of_2(hidden), _MAX_BLOCK)
        chunks = triton.cdiv(hidden, block)
        pdl = use_pdl(table.device)
        _embed_kernel[(rows * chunks,)](
            ids, table, out, start, count, hidden, chunks, block, pdl, num_warps=max(block // 256, 1), launch_pdl=pdl
        )
    return out


@kernel
@triton.jit
def _embed_kernel(
    ids: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    START: tl.constexpr,
    COUNT: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program for BLOCK columns of one row."""
    if PDL:
        gdc_launch_dependents()
    row = (tl.program_id(0) // CHUNKS).to(tl.int64)
    column = (tl.program_id(0) % CHUNKS) * BLOCK + tl.arange(0, BLOCK)
    mask = column < HIDDEN
    if PDL:
        gdc_wait()
    own = tl.load(ids + row) - START
    width = tl.where((own >= 0) & (own < COUNT), HIDDEN, 0)
    value = tl.load(table + own * HIDDEN + column, column < width, 0.0)
    tl.store(out + row * HIDDEN + column, value, mask)
