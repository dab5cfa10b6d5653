"""A weight matrix, and its quantised form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from runtime.model_config import ModelError
from runtime.ops import Ops

FP8 = torch.float8_e4m3fn


def frozen(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised weight that nobody trains."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def check_float8(device: torch.device) -> None:
    """Raises ModelError for a card without float8 (before Ada and Hopper, capability 8.9)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ModelError("this card has no float8; leave model.quantization at none and model.kv_cache_dtype at auto")


class Linear(nn.Module):
    """x [T, K] -> x weight^T + bias [T, N], weight [N, K].

    After `quantise_` the weight is float8 (e4m3), each output row times a float32 scale of its own.
    """

    def __init__(self, n: int, k: int, *, bias: bool = False, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = frozen(n, k, dtype=dtype, device=device)
        self.bias = frozen(n, dtype=dtype, device=device) if bias else None
        self.register_buffer("scale", None)
        self.scale: Tensor | None

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        return ops.linear(x, self.weight, self.bias, self.scale)

    @torch.no_grad()
    def quantise_(self) -> None:
        """Round the weight to float8, a row at the scale of its largest magnitude."""
        largest = self.weight.abs().amax(dim=1).float().clamp_(min=1e-12)
        self.scale = largest / torch.finfo(FP8).max
        quantised = (self.weight.float() / self.scale[:, None]).to(FP8)
        self.weight = nn.Parameter(quantised, requires_grad=False)
