"""The kernels of a mixture of experts against plain torch: the sorting exactly, the products up to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from runtime.kernels import moe, moe_routing
from runtime.model_config import ModelConfig
from runtime.models import llama
from runtime.models.moe import MoeMlp
from runtime.ops import get_ops
from runtime.weights import load_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FUSED, REFERENCE = get_ops("fused", DEVICE), get_ops("reference", DEVICE)
# Relative errors of a norm. Triton's interpreter cuts a bfloat16 off where the card rounds it to the nearest.
TOLERANCES = {
    torch.float32: 3e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 5e-3 if DEVICE.type == "cuda" else 1e-2,
}


def mlp(
    dtype: torch.dtype, *, experts: int = 8, top_k: int = 2, hidden: int = 64, inner: int = 96, renormalise: bool = True
) -> MoeMlp:
    """Random experts, of sizes that are no powers of two."""
    config = ModelConfig(
        hidden_size=hidden, intermediate_size=inner, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16,
        vocab_size=16, max_model_len=16, num_experts=experts, num_experts_per_tok=top_k, moe_intermediate_size=inner,
        norm_topk_prob=renormalise,
    )  # fmt: skip
    layer = MoeMlp(config, dtype, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(1)
    for weight in layer.parameters():
        weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
    return layer


def tokens(count: int, hidden: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())


def assert_fused_is_close(layer: MoeMlp, x: Tensor) -> None:
    """Against the reference in float32, which must have chosen the same experts."""
    exact = mlp_like(layer)
    expected = exact.mix(x.float(), *layer.route(FUSED.linear(x, layer.router)))
    actual = layer(x, FUSED)
    assert actual.dtype == x.dtype
    assert relative_error(actual, expected) < TOLERANCES[x.dtype]


def mlp_like(layer: MoeMlp) -> MoeMlp:
    """The same experts in float32."""
    experts, hidden, inner = layer.down.shape
    exact = mlp(torch.float32, experts=experts, top_k=layer.top_k, hidden=hidden, inner=inner)
    for mine, weight in zip(exact.parameters(), layer.parameters(), strict=True):
        mine.copy_(weight)
    return exact


@pytest.mark.parametrize(("dtype", "renormalise"), [(dtype, True) for dtype in TOLERANCES] + [(torch.float32, False)])
@pytest.mark.parametrize("count", [1, 3, 17])
def test_fused_experts_equal_the_reference(dtype: torch.dtype, count: int, renormalise: bool) -> None:
    assert_fused_is_close(mlp(dtype, renormalise=renormalise), tokens(count, dtype=dtype))


@pytest.mark.parametrize("tile", [moe._FEW, moe._SOME, moe._MANY], ids=["few", "some", "many"])
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_every_tile_gives_the_same_experts(dtype: torch.dtype, tile: moe.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "choose_tile", lambda *_: tile)
    assert_fused_is_close(mlp(dtype, experts=3), tokens(150, dtype=dtype))


def test_no_token_gives_no_row() -> None:
    layer = mlp(torch.float32)
    assert layer(tokens(0), FUSED).shape == (0, 64)
    assert layer(tokens(0), REFERENCE).shape == (0, 64)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_tokens_among_many_experts_are_not_sorted_and_come_out_the_same(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> moe_routing.Blocks:
        raise AssertionError("sorted")

    monkeypatch.setattr(moe, "align", refuse)
    assert_fused_is_close(mlp(torch.bfloat16, experts=32), tokens(count, dtype=torch.bfloat16))


def test_all_tokens_on_the_same_experts_fill_several_blocks_of_theirs() -> None:
    layer = mlp(torch.float32)
    x = tokens(1).expand(20, 64).contiguous()
    assert (
        moe_routing.align(moe_routing.route(x @ layer.router.T, 2, True)[0], 8, 16).experts.unique().numel() <= 3
    )  # and surplus
    assert_fused_is_close(layer, x)


def test_rows_of_zeros_stay_zeros_and_change_no_other_row() -> None:
    layer, x = mlp(torch.bfloat16), tokens(5, dtype=torch.bfloat16)
    padded = torch.cat((x, torch.zeros(11, 64, dtype=x.dtype, device=DEVICE)))
    out = layer(padded, FUSED)
    assert bool((out[5:] == 0).all())
    assert relative_error(out[:5], layer(x, FUSED).float()) < TOLERANCES[torch.bfloat16]


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # NumPy's, in the interpreter
def test_a_row_that_is_no_number_changes_no_other_row() -> None:
    layer, x = mlp(torch.float32), tokens(6)
    broken = x.clone()
    broken[2] = float("nan")
    out, expected = layer(broken, FUSED), layer(x, FUSED)
    others = [0, 1, 3, 4, 5]
    assert relative_error(out[others], expected[others]) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (128, 8), (5, 3), (4, 4)])
def test_routing_is_that_of_the_reference(experts: int, top_k: int, renormalise: bool) -> None:
    layer = mlp(torch.float32, experts=experts, top_k=top_k, renormalise=renormalise)
    logits = torch.randn(9, experts, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    logits[1] = 0.5  # all equal: the lowest experts
    logits[2] = logits[2].round()  # some equal
    chosen, weights = moe_routing.route(logits, top_k, renormalise)
    expected_experts, expected_weights = layer.route(logits)
    assert chosen.tolist() == expected_experts.tolist()
    assert chosen[1].tolist() == list(range(top_k))
    torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=1e-5)


CHOICES = {
    "spread": torch.randint(0, 8, (21, 2), generator=torch.Generator().manual_seed(4)),
    "one expert gets all": torch.full((40, 1), 3),
    "the first and the last get none": torch.randint(1, 7, (50, 3), generator=torch.Generator().manual_seed(5)),
    "more pairs than are read at once": torch.randint(0, 8, (2100, 2), generator=torch.Generator().manual_seed(6)),
    "more blocks of one expert than are written at once": torch.full((2100, 1), 7),
    "a single pair": torch.tensor([[5]]),
}


@pytest.mark.parametrize("name", CHOICES)
def test_sorted_blocks_hold_every_pair_once_in_order_with_its_expert(name: str) -> None:
    chosen = CHOICES[name]
    blocks = moe_routing.align(chosen.to(DEVICE, torch.int32), 8, 16)
    flat = chosen.flatten().tolist()
    expected: list[tuple[int, list[int]]] = []
    for expert in range(8):
        mine = [pair for pair, its in enumerate(flat) if its == expert]
        mine += [len(flat)] * (-len(mine) % 16)
        expected += [(expert, mine[at : at + 16]) for at in range(0, len(mine), 16)]
    used = len(expected)
    assert used <= moe_routing.most_blocks(len(flat), 8, 16) == len(blocks.experts)
    assert list(zip(blocks.experts[:used].tolist(), blocks.pairs[:used].tolist(), strict=True)) == expected
    assert blocks.experts[used:].tolist() == [-1] * (len(blocks.experts) - used)


@pytest.mark.parametrize("num_pairs", [1, 7, 8, 9, 40, 129])
def test_the_worst_routing_needs_exactly_the_most_blocks(num_pairs: int) -> None:
    """All experts but one with as few pairs as make a new block."""
    spread = min(num_pairs, 8)
    counts = [1] * spread
    counts[0] += num_pairs - spread
    assert sum(-(-count // 16) for count in counts) <= moe_routing.most_blocks(num_pairs, 8, 16)
    full = (num_pairs - spread) // 16
    assert moe_routing.most_blocks(num_pairs, 8, 16) == spread + full


def test_sizes_that_are_no_multiple_of_16_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16, not 40"):
        mlp(torch.float32, inner=40)(tokens(3), FUSED)


def test_a_whole_model_of_experts_says_the_same_with_fused_operations(
    hand_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model("tiny-moe", load_format="dummy", device=DEVICE).model
    for name, weight in model.weight_slots():
        if not name.endswith("norm.weight"):
            weight.mul_(8)  # large enough for experts to differ
    logits = {}
    for ops in ("reference", "fused"):
        monkeypatch.setattr(llama, "get_ops", lambda _, device, ops=ops: get_ops(ops, device))
        runner = hand_runner(model, num_blocks=8)
        runner.add(0, range(3, 33))
        runner.add(1, [5, 6, 7])
        steps = runner.step({0: 30, 1: 2}, pad_rows=2), runner.step({1: 1})
        logits[ops] = torch.cat([steps[0][0], steps[0][1], steps[1][1]])
    assert logits["reference"].std() > 1
    assert relative_error(logits["fused"], logits["reference"]) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("count", [1, 4, 64, 256, 2048])
def test_a_layer_of_qwen3_30b_a3b_equals_the_reference_and_replays_from_a_graph(count: int) -> None:
    layer = mlp(torch.bfloat16, experts=128, top_k=8, hidden=2048, inner=768)
    x = tokens(count, hidden=2048, dtype=torch.bfloat16)
    assert_fused_is_close(layer, x)
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros_like(x)
    with torch.cuda.graph(graph):
        out = layer(static, FUSED)
    static.copy_(x)  # other experts than those captured
    graph.replay()
    assert bool((out == layer(x, FUSED)).all())
