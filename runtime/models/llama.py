"""Llama (Touvron et al., arXiv:2302.13971) over a paged KV cache, inference only.

Serves Llama, SmolLM2 and Mistral as they are, Qwen2 (biases on q, k, v) and Qwen3 (per-head norm on q and k)
by a flag of the config. q, k and v are one matrix product, and so are gate and up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.attention.base import AttentionBackend
from runtime.forward import ForwardInputs
from runtime.kv_cache import PagedKVCache
from runtime.model_config import ModelConfig
from runtime.models.linear import Linear, frozen
from runtime.models.moe import MoeMlp
from runtime.ops import Ops, get_ops
from runtime.ops.base import Rotary
from runtime.parallel.ranks import Ranks
from runtime.parallel.shard import layout_of


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


@dataclass(slots=True)
class StepContext:
    """What all layers of one step share."""

    inputs: ForwardInputs
    cos: Tensor  # [max_model_len, head_dim / 2] float32
    sin: Tensor
    kv_cache: PagedKVCache
    attention: AttentionBackend
    plan: object
    ops: Ops
    ranks: Ranks


class GatedMlp(nn.Module):
    """down(silu(gate x) * up x), gate and up in one product."""

    block_name = "mlp"

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_up = Linear(2 * config.intermediate_size, config.hidden_size, dtype=dtype, device=device)
        self.down = Linear(config.hidden_size, config.intermediate_size, dtype=dtype, device=device)

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size]."""
        return self.down(ops.gated(x, self.gate_up.weight, self.gate_up.scale), ops)

    def weight_slots(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Every weight under its Hugging Face name after `prefix`, as a view into the parameter it belongs to."""
        gate, up = self.gate_up.weight.chunk(2)
        yield f"{prefix}gate_proj.weight", gate
        yield f"{prefix}up_proj.weight", up
        yield f"{prefix}down_proj.weight", self.down.weight


class LlamaLayer(nn.Module):
    """One decoder layer: attention and an MLP, each on a normalised copy and added back to the residual stream."""

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.index = index
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        hidden, qkv_size = config.hidden_size, config.q_size + 2 * config.kv_size
        self.attention_norm = frozen(hidden, dtype=dtype, device=device)
        self.qkv = Linear(qkv_size, hidden, bias=config.qkv_bias, dtype=dtype, device=device)
        self.q_norm = frozen(config.head_dim, dtype=dtype, device=device) if config.qk_norm else None
        self.k_norm = frozen(config.head_dim, dtype=dtype, device=device) if config.qk_norm else None
        self.output = Linear(hidden, config.q_size, dtype=dtype, device=device)
        self.mlp_norm = frozen(hidden, dtype=dtype, device=device)
        self.mlp: GatedMlp | MoeMlp = (MoeMlp if config.num_experts else GatedMlp)(config, dtype, device)

    def forward(self, x: Tensor, residual: Tensor | None, step: StepContext) -> tuple[Tensor, Tensor]:
        """x [T, hidden_size], still to be summed over the ranks and added to the residual stream -> the same, and the
        stream.

        Without a stream, as in the first layer, x becomes it. Writes this step's K and V to the cache on the way.
        """
        ops, ranks = step.ops, step.ranks
        x, residual = ranks.add_norm_(x, residual, self.attention_norm, self.eps, ops)
        key_slots, value_slots = step.kv_cache.slots(self.index)
        how = Rotary(
            step.inputs.positions, step.inputs.slot_mapping, step.cos, step.sin, key_slots, value_slots,
            self.num_heads, self.head_dim, self.q_norm, self.k_norm, self.eps,
        )  # fmt: skip
        query = ops.rotary(self.qkv(x, ops), how)
        attended = step.attention.attend(query, self.index, step.kv_cache, step.plan)
        x, residual = ranks.add_norm_(self.output(attended.flatten(1), ops), residual, self.mlp_norm, self.eps, ops)
        return self.mlp(x, ops), residual


class LlamaModel(nn.Module):
    """A Llama-family model, or one rank's part of it. Weights are uninitialised until a loader fills `weight_slots`.

    `config` is the shape of the part (`runtime.parallel.shard.Layout`).

    Call `attach` once, before the first `forward`, with the cache and the attention backend to use.
    """

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str, ranks: Ranks | None = None
    ) -> None:
        super().__init__()
        device = torch.device(device)
        self.ranks = ranks or Ranks()
        self.layout = layout_of(config, self.ranks.shard)
        self.config = config = self.layout.config
        shape = (self.layout.vocab_rows, config.hidden_size)
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
        self._ops = get_ops("auto", device)

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and hidden states."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    def attach(self, kv_cache: PagedKVCache, attention: AttentionBackend, ops: Ops | None = None) -> None:
        """Use this cache and this attention from now on; and these operations instead of the device's own."""
        self._kv_cache = kv_cache
        self._attention = attention
        self._ops = ops or get_ops("auto", self.device)

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
        kv_cache, attention, ops = self._kv_cache, self._attention, self._ops
        plan = attention.prepare(inputs, kv_cache)
        step = StepContext(inputs, self.cos, self.sin, kv_cache, attention, plan, ops, self.ranks)
        x = self._embed(inputs.input_ids)
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, step)
        return self.ranks.add_norm_(x, residual, self.final_norm, self.config.rms_norm_eps, ops)[0]

    def _embed(self, input_ids: Tensor) -> Tensor:
        """The rank's part of the sum that the embeddings are, [T, hidden_size]."""
        if self.ranks.size == 1:
            return F.embedding(input_ids, self.embedding)
        vocab = self.layout.vocab
        return self._ops.embed_part(input_ids, self.embedding, vocab.start, len(vocab))

    @torch.inference_mode()
    def logits(self, hidden_rows: Tensor) -> Tensor:
        """Logits of chosen rows of `forward`'s result, [N, hidden_size] -> [N, vocab_size], same dtype.

        Of a rank's part of a model [N, vocab_rows] (`Layout`): of its own tokens, and what follows is nothing.
        """
        return self._ops.linear(hidden_rows, self.output_embedding)

    def weight_slots(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its Hugging Face name, as a view into the (fused) parameter it belongs to.

        Of a rank's part of a model the rank's `layout.slice_of` each.
        """
        num_tokens = len(self.layout.vocab)
        yield "model.embed_tokens.weight", self.embedding[:num_tokens]
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, LlamaLayer)
            for name, view in self._layer_slots(layer):
                yield f"model.layers.{i}.{name}", view
        yield "model.norm.weight", self.final_norm
        if not self.config.tie_word_embeddings:
            yield "lm_head.weight", self.output_embedding[:num_tokens]

    def _layer_slots(self, layer: LlamaLayer) -> Iterator[tuple[str, Tensor]]:
        config = self.config
        qkv_sizes = (config.q_size, config.kv_size, config.kv_size)
        yield "input_layernorm.weight", layer.attention_norm
        for name, view in zip("qkv", layer.qkv.weight.split(qkv_sizes), strict=True):
            yield f"self_attn.{name}_proj.weight", view
        if layer.qkv.bias is not None:
            for name, view in zip("qkv", layer.qkv.bias.split(qkv_sizes), strict=True):
                yield f"self_attn.{name}_proj.bias", view
        if layer.q_norm is not None and layer.k_norm is not None:
            yield "self_attn.q_norm.weight", layer.q_norm
            yield "self_attn.k_norm.weight", layer.k_norm
        yield "self_attn.o_proj.weight", layer.output.weight
        yield "post_attention_layernorm.weight", layer.mlp_norm
        yield from layer.mlp.weight_slots(f"{layer.mlp.block_name}.")
