"""Our Llama against an independent one: the transformers package, on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from runtime.weights import LoadedModel
from tests.runtime.tiny_models import TINY, assert_we_compute_the_same

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with grouped queries": ("Llama", {}),
    "llama with as many kv heads as heads": ("Llama", {"num_key_value_heads": 4}),
    "llama with one kv head": ("Llama", {"num_key_value_heads": 1}),
    "llama with a tied output layer": ("Llama", {"tie_word_embeddings": True}),
    "llama with a head size of its own": ("Llama", {"head_dim": 24}),
    "llama 3.1 rope scaling": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


@pytest.fixture(scope="module")
def hf_smollm2(smollm2: LoadedModel) -> Any:
    """The default model as transformers reads it, from the same file but with its own code."""
    path = smollm2.source_path
    assert path is not None
    if path.is_dir():
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    # from_pretrained(gguf_file=...) asks for the accelerate package; the function under it does not.
    shape = load_gguf_checkpoint(str(path))["config"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    left = model.load_state_dict(tensors, strict=False)
    assert left.missing_keys == ["lm_head.weight"]  # tied to the embedding
    assert not left.unexpected_keys
    return model


@pytest.fixture(scope="module")
def token_prompts(smollm2: LoadedModel, prompts: list[str]) -> list[list[int]]:
    assert smollm2.tokenizer is not None
    return [smollm2.tokenizer.encode(prompt) for prompt in prompts]


def test_logits_of_the_default_model_equal_those_of_transformers(
    smollm2: LoadedModel, hf_smollm2: Any, token_prompts: list[list[int]], hand_runner: Any
) -> None:
    runner = hand_runner(smollm2.model, num_blocks=200, shuffle=0)
    for key, tokens in enumerate(token_prompts[:8]):
        runner.add(key, tokens)
    ours = runner.step({key: len(tokens) for key, tokens in enumerate(token_prompts[:8])})
    for key, tokens in enumerate(token_prompts[:8]):
        with torch.inference_mode():
            theirs = hf_smollm2(torch.tensor([tokens])).logits[0]
        # Logits span some 40 units; float32 in another order of summation differs in the fifth digit.
        torch.testing.assert_close(ours[key], theirs, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_tiny_random_model_equals_transformers(name: str, tmp_path: Path, hand_runner: Any) -> None:
    family, changes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(TINY | changes))
    assert_we_compute_the_same(getattr(transformers, f"{family}ForCausalLM")(config), tmp_path, hand_runner)
