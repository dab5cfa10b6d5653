"""The gated activation kernel against PyTorch's operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from runtime.kernels.activation import silu_mul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def error(gate_up: Tensor) -> float:
    gate, up = gate_up.float().chunk(2, dim=-1)
    wanted = F.silu(gate) * up
    return float((silu_mul(gate_up).float() - wanted).norm() / wanted.norm())


def random_rows(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return (3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(0))).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 1536), (2, 1000), (2, 3072)])
def test_silu_of_the_gate_times_up_is_computed_in_float32(rows: int, size: int, dtype: torch.dtype) -> None:
    gate_up = random_rows(rows, 2 * size, dtype)
    assert silu_mul(gate_up).shape == (rows, size)
    assert silu_mul(gate_up).dtype == dtype
    assert error(gate_up) < TOLERANCE[dtype]


def test_very_large_gates_neither_overflow_nor_vanish() -> None:
    gate_up = torch.tensor([[-1e4, 1e4, 2.0, 3.0]], device=DEVICE)
    assert silu_mul(gate_up).tolist() == [[0.0, 3e4]]


def test_no_rows_give_no_rows() -> None:
    assert silu_mul(torch.empty(0, 128, device=DEVICE)).shape == (0, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize(("rows", "size"), [(1, 14336), (256, 3072), (4096, 14336)])
def test_real_shapes_agree_with_pytorch_on_a_card(rows: int, size: int) -> None:
    assert error(random_rows(rows, 2 * size, torch.bfloat16)) < 5e-3
