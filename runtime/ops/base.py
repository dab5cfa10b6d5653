"""What a model asks of the operations it is computed with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(slots=True)
class Rotary:
    """How a step's queries and keys are normalised (Qwen3), rotated and written to one layer's cache.

    positions, slot_mapping: [T] int64, as in ForwardInputs. cos, sin: float32 [max_model_len, head_dim / 2].
    key_slots, value_slots: [slots, num_kv_heads, head_dim]. q_norm, k_norm: [head_dim], or None.
    """

    positions: Tensor
    slot_mapping: Tensor
    cos: Tensor
    sin: Tensor
    key_slots: Tensor
    value_slots: Tensor
    num_heads: int
    head_dim: int
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float


class Ops(Protocol):
    """Operations on T rows. Results are new tensors; a trailing underscore says what is changed in place.

    `weight` of a product is [N, K] as for F.linear; with `scale` float32 [N] it is float8, each row times its scale.
    """

    fused: bool

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[T, H] -> [T, H]."""
        ...

    def add_rms_norm_(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual [T, H] += x [T, H]; returns its RMS norm."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, N]."""
        ...

    def gated(self, x: Tensor, gate_up: Tensor, scale: Tensor | None = None) -> Tensor:
        """silu(x gate^T) * (x up^T), gate_up [2 I, K]: [T, K] -> [T, I]."""
        ...

    def rotary(self, qkv: Tensor, how: Rotary) -> Tensor:
        """qkv [T, (heads + 2 kv_heads) head_dim] -> rotated queries [T, heads, head_dim]; K and V go to the cache."""
        ...

    def embed_part(self, ids: Tensor, table: Tensor, start: int, count: int) -> Tensor:
        """Row `id - start` of the table where that is among the first `count`, else zeros: ids [T] -> [T, H]."""
        ...
