"""The products of few rows agree with float32 arithmetic, for every number of rows and ragged shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

pytest.importorskip("triton")

from runtime.kernels.skinny import MAX_ROWS, VECTOR_ROWS, Tiling, _config, launch, skinny_gated, skinny_linear

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SHAPES = [(64, 256), (48, 192), (37, 80), (34, 576), (2, 16)]  # [N, K]
TILINGS = [
    Tiling(4, 128, num_warps=4, depth=2),
    Tiling(4, 64, num_warps=4, depth=3, blocks=3),
    Tiling(1, 64, num_warps=4, depth=1),
    Tiling(16, 64, num_warps=4, depth=3, dot=True, prefetch=128),
    Tiling(32, 128, num_warps=4, depth=4, dot=True),
    Tiling(64, 128, num_warps=4, depth=3, dot=True, prefetch=4096),
]


# The interpreter knows no product of bfloat16 matrices; on the card the tilings are made for 16-bit types.
EXACT = torch.float16 if CUDA else torch.float32


def random(*shape: int, seed: int = 0, dtype: torch.dtype = EXACT) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return values.to(DEVICE, dtype)


def gated_reference(x: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = linear(x.double(), gate_up.double()).chunk(2, dim=-1)
    return silu(gate) * up


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within one rounding to `dtype` of each value, plus what the order of float32 sums may do."""
    assert actual.dtype == dtype
    bfloat16 = 2**-8 if CUDA else 2**-7  # Triton's interpreter cuts off where the card rounds to nearest
    tolerance = {torch.float32: 1e-5, torch.float16: 2**-11, torch.bfloat16: bfloat16}[dtype] * 1.05
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    "m", [*range(1, 10), 13, 16, 17, 32, 33, MAX_ROWS] if CUDA else [1, 2, 4, 5, 9, 16, 33, MAX_ROWS]
)
def test_a_product_agrees_with_float64_for_every_number_of_rows(m: int) -> None:
    for n, k in SHAPES:
        x, weight = random(m, k), random(n, k, seed=1)
        assert_near(skinny_linear(x, weight), linear(x.double(), weight.double()), EXACT)


@pytest.mark.parametrize("m", [1, 2, 9, MAX_ROWS])
def test_a_gated_product_agrees_with_float64(m: int) -> None:
    for n, k in SHAPES:
        x, gate_up = random(m, k), random(2 * n, k, seed=1)
        assert_near(skinny_gated(x, gate_up), gated_reference(x, gate_up), EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_half_precision_is_rounded_once_at_the_end(m: int, dtype: torch.dtype) -> None:
    x, weight, bias = random(m, 192, dtype=dtype), random(48, 192, seed=1, dtype=dtype), random(48, dtype=dtype)
    expected = linear(x.double(), weight.double(), bias.double())
    assert_near(skinny_linear(x, weight, bias), expected, dtype)
    assert_near(skinny_gated(x, weight), gated_reference(x, weight), dtype)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("m", [1, 3, 33])
def test_every_tiling_gives_the_same_product(m: int, tiling: Tiling) -> None:
    if not tiling.dot and m > VECTOR_ROWS:
        pytest.skip("the vector kernel unrolls its loop over the rows")
    for n, k in [(9 if tiling.block_n == 1 else 70, 192), (7, 80)]:
        x, weight, bias = random(m, k), random(2 * n, k, seed=1), random(2 * n, seed=2)
        expected = linear(x.double(), weight.double(), bias.double())
        assert_near(launch(x, weight, bias, None, gated=False, tiling=tiling), expected, EXACT)
        gated = launch(x, weight, None, None, gated=True, tiling=tiling)
        assert_near(gated, gated_reference(x, weight), EXACT)


@pytest.mark.parametrize("m", [1, 4])
def test_activations_may_be_a_slice_of_wider_rows(m: int) -> None:
    wide, weight = random(m, 320), random(40, 192, seed=1)
    x = wide[:, :192]
    assert_near(skinny_linear(x, weight), linear(x.double(), weight.double()), EXACT)


@pytest.mark.parametrize("m", [1, 4])
def test_float8_weights_are_scaled_by_row(m: int) -> None:
    x, weight = random(m, 96, dtype=torch.bfloat16), random(36, 96, seed=1).to(torch.float8_e4m3fn)
    scale = random(36, seed=2, dtype=torch.float32).abs() + 0.5
    real = weight.double() * scale.double()[:, None]
    assert_near(skinny_linear(x, weight, scale=scale), linear(x.double(), real), torch.bfloat16)
    assert_near(skinny_gated(x, weight, scale=scale), gated_reference(x, real), torch.bfloat16)


def test_a_row_of_activations_does_not_see_the_others() -> None:
    x, weight = random(MAX_ROWS, 192), random(48, 192, seed=1)
    for few, more in [(2, 4), (5, 8), (9, 16)]:
        assert torch.equal(skinny_linear(x[:more], weight)[:few], skinny_linear(x[:few], weight))


@pytest.mark.parametrize("m", range(1, VECTOR_ROWS + 1))
def test_the_vector_kernel_asks_for_no_more_weights_than_its_registers_hold(m: int) -> None:
    """128 registers of two weights at most: beyond, they would spill to memory."""
    for n, k in [(6144, 4096), (28672, 4096), (4096, 14336), (151936, 1024), (1024, 3072), (960, 576), (8192, 28672)]:
        tiling = _config(m, n, k)
        tiles = min(tiling.depth, -(-k // tiling.block_k))
        assert tiling.block_n * tiling.block_k * tiles <= 256 * 32 * tiling.num_warps


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA card")
@pytest.mark.parametrize("m", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336), (28672, 4096), (1024, 3072), (960, 576)])
def test_products_of_real_models_agree_with_float32_on_the_card(m: int, n: int, k: int) -> None:
    x, weight = random(m, k, dtype=torch.bfloat16), random(n, k, seed=1, dtype=torch.bfloat16) * k**-0.5
    for actual, expected in [
        (launch(x, weight, None, None, gated=False), linear(x.double(), weight.double())),
        (launch(x, weight, None, None, gated=True), gated_reference(x, weight)),
    ]:
        assert (actual.double() - expected).norm() / expected.norm() < 5e-3


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA card")
def test_a_chain_of_products_in_a_graph_sees_what_the_product_before_wrote() -> None:
    x = random(1, 1024, dtype=torch.bfloat16)
    gate_up = random(6144, 1024, seed=1, dtype=torch.bfloat16) / 32
    down = random(1024, 3072, seed=2, dtype=torch.bfloat16) / 128  # so that the chain neither grows nor fades

    def chain() -> Tensor:
        y = x
        for _ in range(20):
            y = x + skinny_linear(skinny_gated(y, gate_up), down)
        return y

    expected = chain()
    assert 1 < float(expected.float().std()) < 2
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(20):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
