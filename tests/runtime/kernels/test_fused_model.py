"""Whole models by the fused operations and the Triton attention, against the reference in float32."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from runtime.model_config import ModelConfig
from runtime.models.linear import Linear
from runtime.models.llama import LlamaModel
from runtime.weights.dummy import fill_randomly
from tests.runtime.conftest import HandRunner

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SMALL = ModelConfig(
    hidden_size=96, intermediate_size=160, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=16, vocab_size=211,
    max_model_len=256,
)  # fmt: skip
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "qk_norm": True}
FAMILIES = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "tie_word_embeddings": True},
    "qwen3-moe": MOE,
}
LONG, MIDDLE = (80, 40) if CUDA else (15, 6)  # the interpreter takes a second for eight tokens
STEPS = [{0: LONG}, {0: 1, 1: 5, 2: LONG // 3}, {0: 1, 1: 1, 2: 1}, {0: 1, 1: 1, 2: 1, 3: MIDDLE}, {3: 1, 0: 1}]


def relative_error(
    config: ModelConfig,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
    *,
    fused: bool = True,
    fp8_weights: bool = False,
) -> float:
    """Of all logits of a few steps, in `dtype` against the reference in float32 with the same weights."""
    model = LlamaModel(config, dtype=dtype, device=DEVICE)
    fill_randomly(model, seed=3)
    with torch.no_grad():
        model.embedding.mul_(50)  # as in trained models, the residual stream is larger than what a layer adds to it
    exact = LlamaModel(config, dtype=torch.float32, device=DEVICE)
    exact.load_state_dict({name: weight.float() for name, weight in model.state_dict().items()})
    if fp8_weights:
        for part in model.modules():
            if isinstance(part, Linear):
                part.quantise_()
    attention, ops = ("triton", "fused") if fused else ("sdpa", "reference")
    tested = HandRunner(model, num_blocks=40, shuffle=1, attention=attention, ops=ops, kv_dtype=kv_dtype)
    reference = HandRunner(exact, num_blocks=40)
    generator = torch.Generator().manual_seed(0)
    for key in range(4):
        tokens = torch.randint(0, config.vocab_size, (100,), generator=generator).tolist()
        for runner in (tested, reference):
            runner.add(key, tokens)
    difference = total = 0.0
    for plan in STEPS:
        expected = reference.step(plan)
        for key, logits in tested.step(plan, pad_rows=2, pad_sequences=3).items():
            difference += float((logits.double() - expected[key].double()).square().sum())
            total += float(expected[key].double().square().sum())
    return (difference / total) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_path_computes_the_model(family: str) -> None:
    assert relative_error(dataclasses.replace(SMALL, **FAMILIES[family]), torch.float32) < 1e-5


def on_card(family: str, num_layers: int) -> ModelConfig:
    """A layer's real proportions, and widths at which a rounding error is what it is in a real model."""
    wide = {"hidden_size": 1024, "intermediate_size": 1536, "num_heads": 16, "num_kv_heads": 8, "head_dim": 128}
    config = dataclasses.replace(SMALL, vocab_size=4096, num_layers=num_layers, **wide, **FAMILIES[family])
    return dataclasses.replace(config, moe_intermediate_size=256) if config.num_experts else config


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA card")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_a_layer_in_half_precision_is_close_to_float32_on_the_card(
    family: str, dtype: torch.dtype, bound: float
) -> None:
    assert relative_error(on_card(family, num_layers=1), dtype) < bound


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA card")
@pytest.mark.parametrize("family", FAMILIES)
def test_over_layers_the_fused_path_loses_no_more_than_the_reference_in_bfloat16(family: str) -> None:
    config = on_card(family, num_layers=4)
    ours, reference = (relative_error(config, torch.bfloat16, fused=fused) for fused in (True, False))
    assert ours < 1.2 * reference


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA card")
def test_a_float8_cache_keeps_the_logits_close_on_the_card() -> None:
    assert relative_error(on_card("llama", num_layers=2), torch.bfloat16, torch.float8_e4m3fn) < 5e-2


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA card")
def test_float8_weights_keep_the_logits_close_on_the_card() -> None:
    config = on_card("llama", num_layers=2)
    ours, reference = (relative_error(config, torch.bfloat16, fused=f, fp8_weights=True) for f in (True, False))
    assert 1e-2 < reference < 5e-2  # the rounding of the weights
    assert ours < 1.6 * reference  # and, of many rows, of the activations
