"""RMS norm kernels against PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from runtime.kernels.norm import add_rms_norm_, rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
EPS = 1e-5


def tensor(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (3, 576), (5, 1000), (2, 4096)])
def test_the_norm_is_that_of_pytorch_in_float32(rows: int, hidden: int, dtype: torch.dtype) -> None:
    x, weight = tensor(rows, hidden, dtype=dtype, seed=0), tensor(hidden, dtype=dtype, seed=1)
    out = rms_norm(x, weight, EPS)
    wanted = F.rms_norm(x.float(), (hidden,), weight.float(), EPS)
    assert out.dtype == dtype
    assert out.shape == x.shape
    assert relative_error(out, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (3, 576), (2, 4096)])
def test_the_residual_takes_the_sum_and_the_norm_is_of_the_sum_as_stored(
    rows: int, hidden: int, dtype: torch.dtype
) -> None:
    x, residual = tensor(rows, hidden, dtype=dtype, seed=0), tensor(rows, hidden, dtype=dtype, seed=1)
    weight, given = tensor(hidden, dtype=dtype, seed=2), x.clone()
    total = residual.float() + x.float()
    out = add_rms_norm_(x, residual, weight, EPS)
    assert relative_error(residual, total) < TOLERANCE[dtype]
    assert relative_error(out, F.rms_norm(residual.float(), (hidden,), weight.float(), EPS)) < TOLERANCE[dtype]
    assert torch.equal(x, given)


def test_a_row_of_zeros_stays_zero() -> None:
    x, weight = torch.zeros(2, 64, device=DEVICE), torch.ones(64, device=DEVICE)
    assert not rms_norm(x, weight, EPS).any()


def test_no_rows_give_no_rows() -> None:
    empty, weight = torch.empty(0, 64, device=DEVICE), torch.ones(64, device=DEVICE)
    assert rms_norm(empty, weight, EPS).shape == (0, 64)
    assert add_rms_norm_(empty, empty.clone(), weight, EPS).shape == (0, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize(("rows", "hidden"), [(1, 4096), (256, 1024), (8192, 4096)])
def test_real_shapes_agree_with_pytorch_on_a_card(rows: int, hidden: int) -> None:
    x, residual = (tensor(rows, hidden, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    weight, total = tensor(hidden, dtype=torch.bfloat16, seed=2), x + residual
    out = add_rms_norm_(x, residual, weight, EPS)
    assert torch.equal(residual, total)
    assert relative_error(out, F.rms_norm(total.float(), (hidden,), weight.float(), EPS)) < 5e-3
