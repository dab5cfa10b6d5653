"""RMS norm, alone and fused with the residual sum in front of it (Zhang and Sennrich, arXiv:1910.07467)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.launch import kernel, use_pdl


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight by row, in float32 and rounded once: x [T, H], weight [H] -> [T, H]."""
    out = torch.empty_like(x)
    if x.shape[0]:
        _launch(x, x, weight, out, eps, has_residual=False)
    return out


def add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds x to the residual in place and returns the norm of the sum as stored: all [T, H], weight [H]."""
    out = torch.empty_like(x)
    if x.shape[0]:
        _launch(x, residual, weight, out, eps, has_residual=True)
    return out


def _launch(x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, eps: float, *, has_residual: bool) -> None:
    rows, hidden = x.shape
    block = triton.next_power_of_2(hidden)
    pdl = use_pdl(x.device)
    _rms_norm_kernel[(rows,)](
        x,
        residual,
        weight,
        out,
        hidden,
        eps,
        block,
        has_residual,
        pdl,
        num_warps=min(max(block // 512, 1), 16),  # two 16-byte loads of a 16-bit type for each thread
        launch_pdl=pdl,
    )


@kernel
@triton.jit
def _rms_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    HIDDEN: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program a row."""
    if PDL:
        gdc_launch_dependents()
    column = tl.arange(0, BLOCK)
    mask = column < HIDDEN
    scale = tl.load(weight + column, mask, 0.0).to(tl.float32)
    at = tl.program_id(0).to(tl.int64) * HIDDEN + column
    if PDL:
        gdc_wait()
    value = tl.load(x + at, mask, 0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total = (value + tl.load(residual + at, mask, 0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(residual + at, total, mask)
        value = total.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(value * value) / HIDDEN + EPS)
    tl.store(out + at, (value * inverse_rms * scale).to(out.dtype.element_ty), mask)
