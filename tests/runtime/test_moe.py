"""A mixture of experts against an independent one: the transformers package, on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from runtime.model_config import ModelConfig
from runtime.models.moe import MoeMlp
from runtime.ops import get_ops
from runtime.weights import load_model
from runtime.weights.safetensors import read_tensors
from tests.runtime.tiny_models import TINY, assert_we_compute_the_same

QWEN3 = {"head_dim": 16, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("Qwen3Moe", QWEN3 | {"norm_topk_prob": True}),
    "qwen3-moe whose weights do not sum to one": ("Qwen3Moe", QWEN3 | {"norm_topk_prob": False}),
    "qwen3-moe with one expert a token": ("Qwen3Moe", QWEN3 | {"num_experts_per_tok": 1}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
REFERENCE = get_ops("reference", "cpu")
BLOCKS = {"Qwen3Moe": Qwen3MoeSparseMoeBlock, "Mixtral": MixtralSparseMoeBlock}


def hf_config(name: str) -> tuple[Any, ModelConfig]:
    """transformers' configuration, and ours read from it."""
    family, changes = MODELS[name]
    theirs = getattr(transformers, f"{family}Config")(**(TINY | changes))
    return theirs, ModelConfig.from_hf(theirs.to_dict() | {"architectures": [f"{family}ForCausalLM"]})


@pytest.fixture(params=MODELS)
def layers(request: pytest.FixtureRequest) -> tuple[Any, MoeMlp]:
    """transformers' block and ours with the same random weights."""
    torch.manual_seed(0)
    their_config, config = hf_config(request.param)
    theirs = BLOCKS[MODELS[request.param][0]](their_config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    ours = MoeMlp(config, torch.float32, torch.device("cpu"))
    weights = theirs.state_dict()
    ours.router.copy_(weights["gate.weight"])
    ours.gate_up.copy_(weights["experts.gate_up_proj"])
    ours.down.copy_(weights["experts.down_proj"])
    return theirs, ours


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_a_layer_of_experts_equals_that_of_transformers(layers: tuple[Any, MoeMlp], num_tokens: int) -> None:
    theirs, ours = layers
    x = torch.randn(num_tokens, 64)
    with torch.inference_mode():
        expected = theirs(x.unsqueeze(0))[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x, REFERENCE), expected, atol=1e-5, rtol=1e-5)


def test_tokens_come_out_alike_alone_and_together(layers: tuple[Any, MoeMlp]) -> None:
    ours = layers[1]
    x = torch.randn(9, 64)
    together = ours(x, REFERENCE)
    alone = torch.cat([ours(row.unsqueeze(0), REFERENCE) for row in x])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_no_token_and_a_token_of_zeros_do_no_harm(layers: tuple[Any, MoeMlp]) -> None:
    ours = layers[1]
    assert ours(torch.zeros(0, 64), REFERENCE).shape == (0, 64)
    assert bool((ours(torch.zeros(2, 64), REFERENCE) == 0).all())


def test_of_equal_logits_the_lower_expert_is_chosen() -> None:
    ours = MoeMlp(hf_config("qwen3-moe")[1], torch.float32, torch.device("cpu"))
    experts, weights = ours.route(torch.zeros(2, 8))
    assert experts.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3))


@pytest.mark.parametrize(
    ("name", "block", "names"),
    [
        ("qwen3-moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
    ],
)
def test_weights_are_views_under_the_names_of_a_published_checkpoint(
    name: str, block: str, names: tuple[str, str, str], tmp_path: Path
) -> None:
    their_config, config = hf_config(name)
    ours = MoeMlp(config, torch.float32, torch.device("cpu"))
    assert ours.block_name == block
    slots = dict(ours.weight_slots(f"{block}."))
    for slot in slots.values():
        slot.fill_(7.0)
    assert all(bool((weight == 7.0).all()) for weight in ours.parameters())
    gate, up, down = (slots[f"{block}.experts.1.{part}.weight"] for part in names)
    gate.fill_(1.0)
    up.fill_(2.0)
    down.fill_(3.0)
    assert ours.gate_up[1].mean(dim=1).tolist() == [1.0] * len(gate) + [2.0] * len(up)
    assert bool((ours.down[1] == 3.0).all())

    # transformers fuses experts in memory, and writes them as they are published.
    getattr(transformers, f"{MODELS[name][0]}ForCausalLM")(their_config).save_pretrained(tmp_path)
    prefix = "model.layers.0."
    written = {
        key.removeprefix(prefix): torch.Size(tensor.shape)
        for key, tensor in read_tensors(tmp_path)
        if key.startswith(f"{prefix}{block}.")
    }
    assert written == {key: slot.shape for key, slot in slots.items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_tiny_random_model_equals_transformers(name: str, tmp_path: Path, hand_runner: Any) -> None:
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{MODELS[name][0]}ForCausalLM")(hf_config(name)[0])
    assert_we_compute_the_same(theirs, tmp_path, hand_runner)


def test_a_preset_of_experts_runs_with_random_weights(hand_runner: Any) -> None:
    runner = hand_runner(load_model("tiny-moe", load_format="dummy").model, num_blocks=4)
    runner.add(0, [1, 5, 9])
    assert bool(torch.isfinite(runner.step({0: 3})[0]).all())
