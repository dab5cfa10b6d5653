"""The rotary and cache kernel against the model's own steps: head norms, `apply_rope`, cache write."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from runtime.kernels import rotary
from runtime.kernels.rotary import rotary_and_cache
from runtime.ops.reference import apply_rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts float32 to bfloat16 instead of rounding it, and the norm and the rotation both end in that.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3 if DEVICE == "cuda" else 1e-2}
EPS, MAX_LEN = 1e-6, 300


@dataclass
class Case:
    """Random input; `expected` is computed in float32."""

    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    normed: bool = False
    slots: int = 64

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.rows + self.heads)
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = torch.randn(self.rows, width, generator=generator).to(DEVICE, self.dtype)
        self.positions = torch.randint(MAX_LEN, (self.rows,), generator=generator).to(DEVICE)
        self.slot_mapping = torch.randperm(self.slots, generator=generator)[: self.rows].to(DEVICE)
        frequencies = 1e4 ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = torch.outer(torch.arange(MAX_LEN).float(), frequencies)
        self.cos, self.sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
        self.norms: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.normed:
            query_norm, key_norm = torch.rand(2, self.head_dim, generator=generator).to(DEVICE, self.dtype)
            self.norms = (query_norm, key_norm)
        shape = (self.slots, self.kv_heads, self.head_dim)
        self.keys, self.values = torch.zeros(2, *shape, dtype=self.dtype, device=DEVICE)

    def run(self) -> Tensor:
        return rotary_and_cache(
            self.qkv,
            self.positions,
            self.cos,
            self.sin,
            self.slot_mapping,
            self.keys,
            self.values,
            self.heads,
            self.kv_heads,
            self.head_dim,
            *self.norms,
            EPS,
        )

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [T, heads, head_dim]."""
        parts = self.qkv.float().view(self.rows, -1, self.head_dim).split((self.heads, self.kv_heads, self.kv_heads), 1)
        cos, sin = self.cos[self.positions].unsqueeze(1), self.sin[self.positions].unsqueeze(1)
        rotated = []
        for part, weight in zip(parts[:2], self.norms, strict=True):
            if weight is not None:
                part = F.rms_norm(part, (self.head_dim,), weight.float(), EPS)
            rotated.append(apply_rope(part, cos, sin))
        return rotated[0], rotated[1], parts[2]

    def check(self) -> None:
        query = self.run()
        wanted_query, wanted_key, wanted_value = self.expected()
        assert query.shape == wanted_query.shape
        assert query.dtype == self.dtype
        assert query.is_contiguous()
        assert relative_error(query, wanted_query) < TOLERANCE[self.dtype]
        assert relative_error(self.keys[self.slot_mapping], wanted_key) < TOLERANCE[self.dtype]
        assert torch.equal(self.values[self.slot_mapping].float(), wanted_value)
        others = torch.ones(self.slots, dtype=torch.bool, device=DEVICE)
        others[self.slot_mapping] = False
        assert not self.keys[others].any()
        assert not self.values[others].any()


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 8, 128), (9, 3, 64), (4, 1, 80), (1, 1, 2)])
def test_query_keys_and_values_are_those_of_the_separate_steps(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, normed: bool
) -> None:
    Case(5, heads, kv_heads, head_dim, dtype, normed).check()


def test_one_program_for_all_heads_of_a_row_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary, "_MANY_ROWS", 1)
    Case(5, 9, 3, 64, torch.float32, normed=True).check()


def test_a_row_without_a_slot_writes_nothing() -> None:
    case = Case(4, 4, 2, 64, torch.float32)
    used = case.slot_mapping[:2].clone()
    case.slot_mapping[2:] = -1
    query = case.run()
    _, key, value = case.expected()
    assert torch.isfinite(query).all()
    torch.testing.assert_close(case.keys[used], key[:2])
    assert torch.equal(case.values[used], value[:2])
    case.keys[used] = 0
    case.values[used] = 0
    assert not case.keys.any()
    assert not case.values.any()


def test_rows_of_qkv_may_be_spaced() -> None:
    case = Case(3, 4, 2, 64, torch.float32)
    wide = torch.full((3, case.qkv.shape[1] + 48), 7.0, device=DEVICE)
    wide[:, : case.qkv.shape[1]] = case.qkv
    case.qkv = wide[:, : case.qkv.shape[1]]
    query = case.run()
    case.qkv = case.qkv.contiguous()
    torch.testing.assert_close(query, case.expected()[0])


def test_an_fp8_cache_holds_saturated_values() -> None:
    # Quarter turns and values that fp8 holds exactly or that saturate, so no rounding is involved.
    case = Case(8, 4, 2, 64, torch.float32 if DEVICE == "cpu" else torch.bfloat16)
    quarter = torch.randint(4, case.cos.shape, generator=torch.Generator().manual_seed(0))
    case.cos = torch.tensor([1.0, 0.0, -1.0, 0.0])[quarter].to(DEVICE)
    case.sin = torch.tensor([0.0, 1.0, 0.0, -1.0])[quarter].to(DEVICE)
    exact = torch.tensor([-1e4, -448.0, -3.5, -0.25, 0.0, 1.0, 12.0, 416.0, 512.0], device=DEVICE)
    pick = torch.randint(len(exact), case.qkv.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    case.qkv = exact[pick].to(case.dtype)
    case.keys, case.values = (cache.to(torch.float8_e4m3fn) for cache in (case.keys, case.values))
    case.run()
    _, key, value = case.expected()
    for cache, wanted in ((case.keys, key), (case.values, value)):
        stored = cache.float()[case.slot_mapping]
        assert torch.equal(stored, wanted.clamp(-448, 448))
        assert stored.max() == 448


def test_no_rows_give_no_rows() -> None:
    assert Case(0, 4, 2, 64, torch.float32).run().shape == (0, 4, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize(("heads", "normed"), [(32, False), (16, True)])
@pytest.mark.parametrize("rows", [1, 256, 8192])
def test_real_shapes_agree_on_a_card(rows: int, heads: int, normed: bool) -> None:
    Case(rows, heads, 8, 128, torch.bfloat16, normed, slots=10000).check()
