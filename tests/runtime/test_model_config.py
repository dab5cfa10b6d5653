"""Reading a model's shape, and refusing what is not supported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from policies.model_shape import ModelShape
from runtime.model_config import PRESETS, Llama3RopeScaling, ModelConfig, ModelError
from runtime.models.llama import rope_inverse_frequencies

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": [151645, 151643],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
MIXTRAL = LLAMA | {
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_scaling": None,
}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 48,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 100,
}


def test_a_published_config_gives_the_preset_of_that_model() -> None:
    assert ModelConfig.from_hf(LLAMA) == ModelConfig.preset("llama-3.1-8b")


def test_rope_is_read_from_the_newer_layout_too() -> None:
    newer = {key: value for key, value in LLAMA.items() if not key.startswith("rope")}
    newer["rope_parameters"] = LLAMA["rope_scaling"] | {"rope_theta": 500000.0}
    assert ModelConfig.from_hf(newer) == ModelConfig.from_hf(LLAMA)


def test_a_config_without_kv_heads_has_as_many_as_heads() -> None:
    config = ModelConfig.from_hf(LLAMA | {"num_key_value_heads": None})
    assert config.num_kv_heads == config.num_heads == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported; known: LlamaForCausalLM"),
        ({"architectures": None}, "architecture none is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, "sliding-window"),
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"num_key_value_heads": 5}, "not a multiple"),
        ({"vocab_size": -1}, "vocab_size=-1 must be a positive integer"),
        ({"num_hidden_layers": "32"}, "num_layers='32' must be a positive integer"),
        ({"head_dim": 65}, "head_dim=65 is odd"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_hf(LLAMA | change)


def test_a_window_as_long_as_the_context_is_no_window() -> None:
    config = LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": 131072}
    assert ModelConfig.from_hf(config) == ModelConfig.from_hf(LLAMA)


def test_qwen2_ignores_its_window_unless_it_is_switched_on() -> None:
    config = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096}
    assert ModelConfig.from_hf(config).qkv_bias
    with pytest.raises(ModelError, match="sliding-window"):
        ModelConfig.from_hf(config | {"use_sliding_window": True})


def test_qwen3_moe_is_qwen3_with_experts_and_no_other_mlp() -> None:
    config = ModelConfig.from_hf(QWEN3_MOE)
    assert config == ModelConfig.preset("qwen3-30b-a3b")
    assert config.qk_norm
    assert config.intermediate_size == config.moe_intermediate_size == 768


def test_experts_are_counted_under_either_name_and_their_weights_left_alone_unless_asked() -> None:
    newer = {key: value for key, value in QWEN3_MOE.items() if key not in ("num_experts", "norm_topk_prob")}
    config = ModelConfig.from_hf(newer | {"num_local_experts": 128})
    assert config == dataclasses.replace(ModelConfig.preset("qwen3-30b-a3b"), norm_topk_prob=False)


def test_experts_of_mixtral_are_as_wide_as_its_intermediate_size() -> None:
    config = ModelConfig.from_hf(MIXTRAL)
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (8, 2, 14336)
    assert config.norm_topk_prob
    assert config.mixtral_names
    assert not config.qk_norm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_sparse_step": 2}, "experts in some layers only"),
        ({"mlp_only_layers": [0]}, "experts in some layers only"),
        ({"num_experts": None}, "has no 'num_local_experts'"),
        ({"moe_intermediate_size": None}, "has no 'moe_intermediate_size'"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 must be a positive integer"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok=129 is more than num_experts=128"),
    ],
)
def test_experts_that_are_not_supported_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_hf(QWEN3_MOE | change)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_has_the_experts_of_its_shape(name: str) -> None:
    config, shape = ModelConfig.preset(name), ModelShape.preset(name)
    assert (config.num_experts, config.num_experts_per_tok) == (shape.num_experts, shape.num_experts_per_tok)
    assert config.moe_intermediate_size == (shape.intermediate_size if shape.num_experts else 0)


def test_gguf_metadata_gives_the_shape() -> None:
    config = ModelConfig.from_gguf(GGUF, tie_word_embeddings=True)
    expected = ModelConfig(
        hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        vocab_size=100, max_model_len=64, tie_word_embeddings=True,
    )  # fmt: skip
    assert config == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma3"}, "'gemma3' is not supported; known: 'llama'"),
        ({"llama.expert_count": 8}, "experts"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn'"),
        ({"llama.block_count": None}, "has no 'llama.block_count'"),
    ],
)
def test_gguf_metadata_that_is_not_supported_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_gguf(GGUF | change, tie_word_embeddings=True)


def test_an_unknown_preset_is_refused_with_the_known_names() -> None:
    with pytest.raises(ModelError, match="unknown preset 'gpt-9'; known: tiny, smollm2-135m"):
        ModelConfig.preset("gpt-9")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="is not valid JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    assert ModelConfig.from_folder(tmp_path) == PRESETS["llama-3.1-8b"]


def test_rope_scaling_keeps_high_frequencies_and_stretches_low_ones() -> None:
    scaled = PRESETS["llama-3.1-8b"]
    plain = rope_inverse_frequencies(dataclasses.replace(scaled, rope_scaling=None))
    ratio = plain / rope_inverse_frequencies(scaled)
    assert ratio[0] == 1.0
    torch.testing.assert_close(ratio[-1], torch.tensor(8.0))
    assert bool((ratio[1:] >= ratio[:-1] - 1e-5).all())
    assert scaled.rope_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 8192)
