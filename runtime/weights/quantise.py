"""Rounding a loaded model's weights to float8 (e4m3; Micikevicius et al., arXiv:2209.05433), a scale a row."""

from __future__ import annotations

import torch

from runtime.model_config import ModelConfig, ModelError
from runtime.models.linear import Linear, check_float8
from runtime.models.llama import LlamaModel

QUANTIZATIONS = ("none", "fp8")


def check_quantisable(
    quantization: str, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> None:
    """Raises ModelError for an unknown name, and for a model that fp8 weights are not made for."""
    if quantization not in QUANTIZATIONS:
        raise ModelError(f"unknown quantization {quantization!r}; known: {', '.join(QUANTIZATIONS)}")
    if quantization == "none":
        return
    check_float8(torch.device(device))
    if config.num_experts:
        raise ModelError(f"a mixture of experts has no {quantization} weights; leave quantization at none")
    if dtype == torch.float32:
        raise ModelError(f"{quantization} weights need the dtype bfloat16 or float16, not float32")


def quantise_layers_(model: LlamaModel) -> None:
    """Quantise the linear weights of every layer, one matrix after another: little memory is needed beside them.

    Embedding, norms, biases and the LM head stay as they are.
    """
    for module in model.layers.modules():
        if isinstance(module, Linear):
            module.quantise_()
