"""The shape of a model: everything about a decoder-only transformer that is not a weight.

One frozen dataclass serves the whole Llama family (Llama, SmolLM2, Mistral) and its two near relatives, which
differ by one flag each: Qwen2 has biases on q, k and v; Qwen3 normalises every head of q and k. With
`num_experts` every layer's MLP is a mixture of experts (Shazeer et al., arXiv:1701.06538): Qwen3-MoE, Mixtral.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.model_shape import ModelShape


class ModelError(ValueError):
    """A model that cannot be loaded or is not supported. The message is one line and says what to do."""


@dataclass(frozen=True, slots=True)
class Llama3RopeScaling:
    """The frequency scaling of Llama 3.1 (arXiv:2407.21783): long wavelengths are stretched by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a Llama-family model.

    `max_model_len` is the longest sequence (prompt and output together, in tokens) the rope tables are made
    for. `eos_token_ids` end a generation; `bos_token_id` is None where the model has none.

    Of a mixture of experts `intermediate_size` and `moe_intermediate_size` are both the width of one expert: there
    is no other MLP.

    Raises ModelError when the numbers do not fit together.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Llama3RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    num_experts: int = 0  # 0: dense
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True  # the weights of a token's experts sum to one
    mixtral_names: bool = False  # the experts' weights are called as Mixtral calls them, else as Qwen3-MoE

    def __post_init__(self) -> None:
        for field in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            _require_positive(field, getattr(self, field))
        for field in ("head_dim", "vocab_size", "max_model_len"):
            _require_positive(field, getattr(self, field))
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; check the config"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim={self.head_dim} is odd, and rotary embeddings need pairs; check the config")
        if self.num_experts or self.num_experts_per_tok or self.moe_intermediate_size:
            for field in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
                _require_positive(field, getattr(self, field))
            if self.num_experts_per_tok > self.num_experts:
                raise ModelError(
                    f"num_experts_per_tok={self.num_experts_per_tok} is more than num_experts={self.num_experts};"
                    " check the config"
                )

    @property
    def q_size(self) -> int:
        """Width of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the key (and of the value) projection."""
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face config.json. Raises ModelError for what is not supported."""
        family = _hf_family(config)
        hidden_size = _get(config, "hidden_size")
        num_heads = _get(config, "num_attention_heads")
        max_model_len = _get(config, "max_position_embeddings")
        _refuse_hf_options(config, family, max_model_len)
        # Configs before transformers 5 have rope_theta and rope_scaling; newer ones one dict,
        # rope_parameters.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        eos = config.get("eos_token_id")
        experts = _hf_experts(config, family)
        return cls(
            hidden_size=hidden_size,
            intermediate_size=experts.get("moe_intermediate_size") or _get(config, "intermediate_size"),
            num_layers=_get(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or hidden_size // num_heads,
            vocab_size=_get(config, "vocab_size"),
            max_model_len=max_model_len,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            rope_scaling=_hf_rope_scaling(rope),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "Qwen2ForCausalLM",
            qk_norm=family in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
            **experts,
        )

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read `folder`/config.json. Raises ModelError when it is missing, not JSON, or not supported."""
        path = folder / "config.json"
        if not path.is_file():
            raise ModelError(f"{folder} has no config.json; point at a folder in the Hugging Face layout")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{path} is not valid JSON ({error}); fetch it again") from error
        return cls.from_hf(content)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, tie_word_embeddings: bool) -> ModelConfig:
        """Read the key-value metadata of a GGUF file (plain Python values).

        Whether the output layer is tied is known only from the list of tensors, hence the argument.
        Raises ModelError for an architecture other than llama, for experts, and for scaled rope.
        """
        architecture = metadata.get("general.architecture")
        if architecture != "llama":
            raise ModelError(f"GGUF architecture {architecture!r} is not supported; known: 'llama'")
        if metadata.get("llama.expert_count"):
            raise ModelError("GGUF files with experts (mixture of experts) are not supported; use a dense model")
        scaling = metadata.get("llama.rope.scaling.type", "none")
        if scaling != "none":
            raise ModelError(f"GGUF rope scaling {scaling!r} is not supported; use the model's safetensors files")
        hidden_size = _get(metadata, "llama.embedding_length")
        num_heads = _get(metadata, "llama.attention.head_count")
        eos = metadata.get("tokenizer.ggml.eos_token_id")
        return cls(
            hidden_size=hidden_size,
            intermediate_size=_get(metadata, "llama.feed_forward_length"),
            num_layers=_get(metadata, "llama.block_count"),
            num_heads=num_heads,
            num_kv_heads=metadata.get("llama.attention.head_count_kv", num_heads),
            head_dim=metadata.get("llama.attention.key_length", hidden_size // num_heads),
            vocab_size=metadata.get("llama.vocab_size") or len(_get(metadata, "tokenizer.ggml.tokens")),
            max_model_len=_get(metadata, "llama.context_length"),
            rms_norm_eps=float(_get(metadata, "llama.attention.layer_norm_rms_epsilon")),
            rope_theta=float(metadata.get("llama.rope.freq_base", 10000.0)),
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=() if eos is None else (eos,),
        )

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """A shape by name, for random weights. Raises ModelError naming the known ones."""
        if name not in PRESETS:
            raise ModelError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        return PRESETS[name]


_HF_FAMILIES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "MixtralForCausalLM",
)


def _hf_family(config: Mapping[str, Any]) -> str:
    named = config.get("architectures") or []
    for architecture in named:
        if architecture in _HF_FAMILIES:
            return architecture
    raise ModelError(f"architecture {', '.join(named) or 'none'} is not supported; known: {', '.join(_HF_FAMILIES)}")


def _hf_experts(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The fields of a mixture of experts; none for a dense family."""
    if family == "MixtralForCausalLM":
        return {
            "num_experts": _get(config, "num_local_experts"),
            "num_experts_per_tok": _get(config, "num_experts_per_tok"),
            "moe_intermediate_size": _get(config, "intermediate_size"),
            "mixtral_names": True,
        }
    if family != "Qwen3MoeForCausalLM":
        return {}
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise ModelError(
            "a model with experts in some layers only (decoder_sparse_step, mlp_only_layers) is not supported;"
            " use one with experts in every layer"
        )
    return {
        # transformers 5 writes Mixtral's name for it.
        "num_experts": config.get("num_experts") or _get(config, "num_local_experts"),
        "num_experts_per_tok": _get(config, "num_experts_per_tok"),
        "moe_intermediate_size": _get(config, "moe_intermediate_size"),
        "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
    }


def _refuse_hf_options(config: Mapping[str, Any], family: str, max_model_len: int) -> None:
    """Options that would change the result if they were ignored."""
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"hidden_act={activation!r} is not supported; known: 'silu'")
    # Qwen2 names its biases by architecture, not by this flag.
    for flag in ("attention_bias", "mlp_bias"):
        if config.get(flag):
            raise ModelError(f"{flag}=true is not supported; use a model without these biases")
    window = config.get("sliding_window")
    if family.startswith("Qwen") and not config.get("use_sliding_window"):
        window = None
    if window is not None and window < max_model_len:
        raise ModelError(
            f"sliding-window attention ({window} of {max_model_len} tokens) is not supported;"
            f" use a model without it, or set max_position_embeddings to {window} in its config.json"
        )


def _hf_rope_scaling(rope: Mapping[str, Any]) -> Llama3RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("partial rotary embeddings are not supported; use a model that rotates whole heads")
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(f"rope scaling {kind!r} is not supported; known: 'default', 'llama3'")
    return Llama3RopeScaling(
        factor=float(_get(rope, "factor")),
        low_freq_factor=float(_get(rope, "low_freq_factor")),
        high_freq_factor=float(_get(rope, "high_freq_factor")),
        original_max_position_embeddings=int(_get(rope, "original_max_position_embeddings")),
    )


def _get(mapping: Mapping[str, Any], key: str) -> Any:
    if mapping.get(key) is None:
        raise ModelError(f"the model's config has no {key!r}; fetch the model again")
    return mapping[key]


def _require_positive(field: str, value: object) -> None:
    if not isinstance(value, int) or value <= 0:
        raise ModelError(f"{field}={value!r} must be a positive integer; check the config")


def _sized(name: str, max_model_len: int, **rest: Any) -> ModelConfig:
    """The config of a model whose sizes `policies.model_shape` knows."""
    shape = ModelShape.preset(name)
    sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    experts = ("num_experts", "num_experts_per_tok")
    return ModelConfig(
        **{size: getattr(shape, size) for size in (*sizes, *experts)},
        max_model_len=max_model_len,
        moe_intermediate_size=shape.intermediate_size if shape.num_experts else 0,
        tie_word_embeddings=shape.tied_embeddings,
        **rest,
    )


_LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_scaling": Llama3RopeScaling(8.0, 1.0, 4.0, 8192),
    "bos_token_id": 128000,
    "eos_token_ids": (128001, 128008, 128009),
}
_QWEN = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "bos_token_id": 151643,
    "eos_token_ids": (151645, 151643),
}

PRESETS: dict[str, ModelConfig] = {
    "tiny": _sized("tiny", 1024, bos_token_id=1, eos_token_ids=(2,)),
    "smollm2-135m": _sized("smollm2-135m", 8192, rope_theta=100000.0, bos_token_id=1, eos_token_ids=(2,)),
    "llama-3.1-8b": _sized("llama-3.1-8b", 131072, **_LLAMA3),
    "llama-3.1-70b": _sized("llama-3.1-70b", 131072, **_LLAMA3),
    "qwen2.5-0.5b": _sized("qwen2.5-0.5b", 32768, qkv_bias=True, **_QWEN),
    "qwen3-0.6b": _sized("qwen3-0.6b", 40960, qk_norm=True, **_QWEN),
    "tiny-moe": _sized("tiny-moe", 1024, qk_norm=True, bos_token_id=1, eos_token_ids=(2,)),
    "qwen3-30b-a3b": _sized("qwen3-30b-a3b", 40960, qk_norm=True, **_QWEN),
}
