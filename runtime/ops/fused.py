"""The operations as few kernels: ours in Triton, and cuBLAS for the larger products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.kernels.activation import silu_mul
from runtime.kernels.embedding import embed_part
from runtime.kernels.norm import add_rms_norm_, rms_norm
from runtime.kernels.rotary import rotary_and_cache
from runtime.kernels.skinny import serves, skinny_gated, skinny_linear
from runtime.ops.base import Rotary


class FusedOps:
    """See `runtime.ops.base.Ops`. Needs Triton; on a CPU its interpreter."""

    fused = True

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_rms_norm_(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return add_rms_norm_(x, residual, weight, eps)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        if serves(len(x), weight):
            return skinny_linear(x, weight, bias, scale)
        return F.linear(x, weight, bias) if scale is None else _scaled_linear(x, weight, scale, bias)

    def gated(self, x: Tensor, gate_up: Tensor, scale: Tensor | None = None) -> Tensor:
        if serves(len(x), gate_up):
            return skinny_gated(x, gate_up, scale)
        return silu_mul(self.linear(x, gate_up, None, scale))

    def rotary(self, qkv: Tensor, how: Rotary) -> Tensor:
        return rotary_and_cache(
            qkv, how.positions, how.cos, how.sin, how.slot_mapping, how.key_slots, how.value_slots,
            how.num_heads, how.key_slots.shape[1], how.head_dim, how.q_norm, how.k_norm, how.eps,
        )  # fmt: skip

    def embed_part(self, ids: Tensor, table: Tensor, start: int, count: int) -> Tensor:
        return embed_part(ids, table, start, count)


def _scaled_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Rows of x are quantised as they come, each by its largest magnitude, and multiplied in float8."""
    limit = torch.finfo(torch.float8_e4m3fn).max
    row_scale = x.abs().amax(dim=1, keepdim=True).float().clamp_(min=1e-12) / limit
    quantised = (x.float() / row_scale).to(torch.float8_e4m3fn)
    return torch._scaled_mm(
        quantised, weight.t(), row_scale, scale[None, :], bias, out_dtype=x.dtype, use_fast_accum=True
    )
