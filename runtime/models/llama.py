"""Llama (Touvron et al., arXiv:2302.13971) over a paged KV cache, inference only.

Serves Llama, SmolLM2 and Mistral as they are, Qwen2 (biases on q, k, v) and Qwen3 (per-head norm on q and k)
by a flag of the config. q, k and v are one matrix product, and so are gate and up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.attention.base import AttentionBackend
from runtime.forward import ForwardInputs
from runtime.kv_cache import PagedKVCache
from runtime.model_config import ModelConfig


def rope_inverse_frequencies(config: ModelConfig) -> Tensor:
    """Inverse frequencies of the rotary embedding (Su et al., arXiv:2104.09864), [head_dim / 2] float32.

    With `rope_scaling` (Llama 3.1): wavelengths longer than the original context / low_freq_factor are
    stretched by `factor`, those shorter than context / high_freq_factor stay, and those between are
    interpolated.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # in the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, heads, head_dim] by float32 cos, sin [T, 1, head_dim / 2]; halves are paired."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class LlamaLayer(nn.Module):
    """One decoder layer: attention and a gated MLP, each on a normalised copy and added back."""

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.index = index
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        hidden, qkv_size = config.hidden_size, config.q_size + 2 * config.kv_size
        self.attention_norm = weight(hidden)
        self.qkv = weight(qkv_size, hidden)
        self.qkv_bias = weight(qkv_size) if config.qkv_bias else None
        self.q_norm = weight(config.head_dim) if config.qk_norm else None
        self.k_norm = weight(config.head_dim) if config.qk_norm else None
        self.output = weight(hidden, config.q_size)
        self.mlp_norm = weight(hidden)
        self.gate_up = weight(2 * config.intermediate_size, hidden)
        self.down = weight(hidden, config.intermediate_size)

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        slot_mapping: Tensor,
        kv_cache: PagedKVCache,
        attention: AttentionBackend,
        plan: object,
    ) -> Tensor:
        """hidden [T, hidden_size] -> [T, hidden_size]; writes this step's K and V to the cache on the way."""
        x = self._norm(hidden, self.attention_norm)
        hidden = hidden + self._attend(x, cos, sin, slot_mapping, kv_cache, attention, plan)
        gate, up = F.linear(self._norm(hidden, self.mlp_norm), self.gate_up).chunk(2, dim=-1)
        return hidden + F.linear(F.silu(gate) * up, self.down)

    def _attend(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        slot_mapping: Tensor,
        kv_cache: PagedKVCache,
        attention: AttentionBackend,
        plan: object,
    ) -> Tensor:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = F.linear(x, self.qkv, self.qkv_bias).view(len(x), heads + 2 * kv_heads, self.head_dim)
        query_key, value = qkv.split((heads + kv_heads, kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = query_key.split((heads, kv_heads), dim=1)
            query_key = torch.cat((self._norm(query, self.q_norm), self._norm(key, self.k_norm)), dim=1)
        query, key = apply_rope(query_key, cos, sin).split((heads, kv_heads), dim=1)
        kv_cache.write(self.index, key, value, slot_mapping)
        out = attention.attend(query, self.index, kv_cache, plan)
        return F.linear(out.reshape(len(x), heads * self.head_dim), self.output)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)


class LlamaModel(nn.Module):
    """A Llama-family model. Weights are uninitialised until a loader fills `weight_slots`.

    Call `attach` once, before the first `forward`, with the cache and the attention backend to use.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        device = torch.device(device)
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
        self.layers = nn.ModuleList(LlamaLayer(config, i, dtype, device) for i in range(config.num_layers))
        self.final_norm = nn.Parameter(torch.empty(shape[1], dtype=dtype, device=device), requires_grad=False)
        if config.tie_word_embeddings:
            self.output_embedding = self.embedding
        else:
            self.output_embedding = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
        # In float32 whatever the dtype: a bfloat16 angle is wrong by radians at position 1000.
        angles = torch.outer(torch.arange(config.max_model_len).float(), rope_inverse_frequencies(config))
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)  # [max_model_len, head_dim / 2]
        self._kv_cache: PagedKVCache | None = None
        self._attention: AttentionBackend | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and hidden states."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    def attach(self, kv_cache: PagedKVCache, attention: AttentionBackend) -> None:
        """Use this cache and this attention from now on."""
        self._kv_cache = kv_cache
        self._attention = attention

    def detach(self, kv_cache: PagedKVCache) -> None:
        """Let go of this cache, if it is still the one in use: its memory is for the next one."""
        if self._kv_cache is kv_cache:
            self._kv_cache = self._attention = None

    @torch.inference_mode()
    def forward(self, inputs: ForwardInputs) -> Tensor:
        """One step: returns the normalised hidden states [T, hidden_size], and the cache has the step's K and
        V.

        Raises RuntimeError when nothing is attached.
        """
        if self._kv_cache is None or self._attention is None:
            raise RuntimeError("the model has no KV cache; call attach(kv_cache, attention) first")
        kv_cache, attention = self._kv_cache, self._attention
        plan = attention.prepare(inputs, kv_cache)
        cos = self.cos[inputs.positions].unsqueeze(1)
        sin = self.sin[inputs.positions].unsqueeze(1)
        hidden = F.embedding(inputs.input_ids, self.embedding)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, inputs.slot_mapping, kv_cache, attention, plan)
        return F.rms_norm(hidden, (hidden.shape[-1],), self.final_norm, self.config.rms_norm_eps)

    @torch.inference_mode()
    def logits(self, hidden_rows: Tensor) -> Tensor:
        """Logits of chosen rows of `forward`'s result, [N, hidden_size] -> [N, vocab_size], same dtype."""
        return F.linear(hidden_rows, self.output_embedding)

    def weight_slots(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its Hugging Face name, as a view into the (fused) parameter it belongs to."""
        yield "model.embed_tokens.weight", self.embedding
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, LlamaLayer)
            for name, view in self._layer_slots(layer):
                yield f"model.layers.{i}.{name}", view
        yield "model.norm.weight", self.final_norm
        if not self.config.tie_word_embeddings:
            yield "lm_head.weight", self.output_embedding

    def _layer_slots(self, layer: LlamaLayer) -> Iterator[tuple[str, Tensor]]:
        config = self.config
        qkv_sizes = (config.q_size, config.kv_size, config.kv_size)
        yield "input_layernorm.weight", layer.attention_norm
        for name, view in zip("qkv", layer.qkv.split(qkv_sizes), strict=True):
            yield f"self_attn.{name}_proj.weight", view
        if layer.qkv_bias is not None:
            for name, view in zip("qkv", layer.qkv_bias.split(qkv_sizes), strict=True):
                yield f"self_attn.{name}_proj.bias", view
        if layer.q_norm is not None and layer.k_norm is not None:
            yield "self_attn.q_norm.weight", layer.q_norm
            yield "self_attn.k_norm.weight", layer.k_norm
        yield "self_attn.o_proj.weight", layer.output
        yield "post_attention_layernorm.weight", layer.mlp_norm
        gate, up = layer.gate_up.chunk(2)
        yield "mlp.gate_proj.weight", gate
        yield "mlp.up_proj.weight", up
        yield "mlp.down_proj.weight", layer.down
