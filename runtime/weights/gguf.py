"""Models from a GGUF file (llama.cpp's format): metadata, and weights dequantised on the way in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFReader
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

    def read_tensors(self) -> Iterator[tuple[str, GGUFTensor]]:
        """(Hugging Face name, tensor) of every weight."""
        for stored in self._reader.tensors:
            name, kind = _hf_name(stored.name, self.path)
            yield name, GGUFTensor(stored, self.path, self.config.head_dim if kind in ("attn_q", "attn_k") else None)


class GGUFTensor:
    """One tensor of a file. `head_dim`: its rows are those of heads, in llama.cpp's order."""

    def __init__(self, stored: Any, path: Path, head_dim: int | None) -> None:
        self._stored, self._path, self._head_dim = stored, path, head_dim
        self.shape = tuple(int(size) for size in reversed(stored.shape))

    def read(self, dim: int, kept: range) -> Tensor:
        """Float32; see `runtime.weights.fill.StoredTensor`. Rows of q and k are whole heads.

        Of columns the blocks that have them are read, of 32 or 256 numbers of a row.
        """
        stored, data, columns = self._stored, self._stored.data, slice(None)
        if dim == 0:
            data = data[kept.start : kept.stop]
        else:
            block, size = GGML_QUANT_SIZES[stored.tensor_type]
            first, last = kept.start // block, -(-kept.stop // block)
            width = size // data.itemsize  # entries of the array in a block: bytes, or whole numbers
            data = data[:, first * width : last * width]
            columns = slice(kept.start - first * block, kept.stop - first * block)
        try:
            array = dequantize(data, stored.tensor_type)
        except NotImplementedError as error:
            kept_as = stored.tensor_type.name
            raise ModelError(
                f"{self._path}: cannot dequantise {stored.name} ({kept_as}); use another quantisation"
            ) from error
        array = np.asarray(array, dtype=np.float32)
        tensor = torch.from_numpy(np.array(array[..., columns]))  # a copy: the file is mapped read-only
        return tensor if self._head_dim is None else _unpermute(tensor, self._head_dim)


def _hf_name(name: str, path: Path) -> tuple[str, str]:
    """The Hugging Face name of a GGUF tensor, and the part of the layer it is ("" outside layers)."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name], ""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise ModelError(f"{path}: tensor {name} is not part of a Llama; use the model's safetensors files")
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight", match[2]


def _unpermute(weight: Tensor, head_dim: int) -> Tensor:
    """Undo llama.cpp's order of q and k rows: its rope pairs neighbours, the Hugging Face layout halves."""
    rows, columns = weight.shape
    return weight.view(-1, head_dim // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
