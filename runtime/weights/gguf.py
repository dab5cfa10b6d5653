"""Models from a GGUF file (llama.cpp's format): metadata, and weights dequantised on the way in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from runtime.model_config import ModelConfig, ModelError

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFFile:
    """An open GGUF file of a llama-architecture model.

    Raises ModelError when the file is not GGUF, is cut short, or holds a model that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = GGUFReader(path)
            # metadata: plain Python values by key
            self.metadata: dict[str, Any] = {
                key: field.contents() for key, field in self._reader.fields.items() if not key.startswith("GGUF.")
            }
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise ModelError(f"{path} cannot be read as GGUF ({error}); it may be cut short, fetch it again") from error
        names = {tensor.name for tensor in self._reader.tensors}
        if "rope_freqs.weight" in names:
            raise ModelError(f"{path}: scaled rope in GGUF is not supported; use the model's safetensors files")
        self.config = ModelConfig.from_gguf(self.metadata, tie_word_embeddings="output.weight" not in names)

    def read_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, float32 tensor on the CPU) of every weight."""
        heads = {"attn_q": self.config.num_heads, "attn_k": self.config.num_kv_heads}
        for stored in self._reader.tensors:
            name, kind = _hf_name(stored.name, self.path)
            try:
                array = np.asarray(dequantize(stored.data, stored.tensor_type), dtype=np.float32)
            except NotImplementedError as error:
                kept_as = stored.tensor_type.name
                raise ModelError(
                    f"{self.path}: cannot dequantise {stored.name} ({kept_as}); use another quantisation"
                ) from error
            tensor = torch.from_numpy(np.array(array))  # a copy: the file is mapped read-only
            if kind in heads:
                tensor = _unpermute(tensor, heads[kind])
            yield name, tensor


def _hf_name(name: str, path: Path) -> tuple[str, str]:
    """The Hugging Face name of a GGUF tensor, and the part of the layer it is ("" outside layers)."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name], ""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise ModelError(f"{path}: tensor {name} is not part of a Llama; use the model's safetensors files")
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight", match[2]


def _unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's order of q and k rows: its rope pairs neighbours, the Hugging Face layout halves."""
    rows, columns = weight.shape
    return weight.view(num_heads, -1, 2, columns).transpose(1, 2).reshape(rows, columns)
