"""The gated activation of the MLP (Shazeer, arXiv:2002.05202)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.launch import kernel, use_pdl

_MAX_BLOCK = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up in float32, rounded once: [T, 2 I], gate in front of up -> [T, I]."""
    rows, width = gate_up.shape
    size = width // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        block = min(triton.next_power_of_2(size), _MAX_BLOCK)
        chunks = triton.cdiv(size, block)
        pdl = use_pdl(gate_up.device)
        _silu_mul_kernel[(rows * chunks,)](
            gate_up,
            out,
            size,
            chunks,
            block,
            pdl,
            num_warps=max(block // 256, 1),  # a 16-byte load of a 16-bit type for each thread
            launch_pdl=pdl,
        )
    return out


@kernel
@triton.jit
def _silu_mul_kernel(
    gate_up: tl.tensor, out: tl.tensor, SIZE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
) -> None:
    """One program for BLOCK columns of one row; programs side by side share a row, so memory is read in order."""
    if PDL:
        gdc_launch_dependents()
    program = tl.program_id(0)
    row = (program // CHUNKS).to(tl.int64)
    column = (program % CHUNKS) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    if PDL:
        gdc_wait()
    gate = tl.load(gate_up + row * (2 * SIZE) + column, mask, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * SIZE) + SIZE + column, mask, 0.0).to(tl.float32)
    tl.store(out + row * SIZE + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask)
