"""The operations in plain PyTorch. Runs anywhere; what the fused ones are measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.ops.base import Rotary

_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, heads, head_dim] by float32 cos, sin [T, 1, head_dim / 2]; halves are paired."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class ReferenceOps:
    """See `runtime.ops.base.Ops`."""

    fused = False

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def add_rms_norm_(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.rms_norm(residual.add_(x), weight, eps)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        if scale is not None:
            weight = (weight.float() * scale[:, None]).to(x.dtype)
        return F.linear(x, weight, bias)

    def gated(self, x: Tensor, gate_up: Tensor, scale: Tensor | None = None) -> Tensor:
        gate, up = self.linear(x, gate_up, None, scale).chunk(2, dim=-1)
        return F.silu(gate) * up

    def rotary(self, qkv: Tensor, how: Rotary) -> Tensor:
        heads, kv_heads = how.num_heads, how.key_slots.shape[1]
        query, key, value = qkv.view(len(qkv), -1, how.head_dim).split((heads, kv_heads, kv_heads), dim=1)
        if how.q_norm is not None and how.k_norm is not None:
            query, key = self.rms_norm(query, how.q_norm, how.eps), self.rms_norm(key, how.k_norm, how.eps)
        cos, sin = how.cos[how.positions].unsqueeze(1), how.sin[how.positions].unsqueeze(1)
        query, key = apply_rope(torch.cat((query, key), dim=1), cos, sin).split((heads, kv_heads), dim=1)
        how.key_slots[how.slot_mapping] = _as(how.key_slots.dtype, key)
        how.value_slots[how.slot_mapping] = _as(how.value_slots.dtype, value)
        return query

    def embed_part(self, ids: Tensor, table: Tensor, start: int, count: int) -> Tensor:
        own = ids - start
        others = (own < 0) | (own >= count)
        return F.embedding(own.masked_fill_(others, 0), table).masked_fill_(others[:, None], 0)


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    if dtype == torch.float8_e4m3fn:
        x = x.clamp(-_FP8_MAX, _FP8_MAX)
    return x.to(dtype)
