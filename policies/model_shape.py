"""The sizes of a decoder-only transformer, and the work they mean: bytes and floating-point operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model of the Llama family: grouped-query attention and a gated MLP in every layer.

    With `num_experts` every layer's MLP is a mixture of experts (Shazeer et al., arXiv:1701.06538) instead: a router
    sends each token to `num_experts_per_tok` of `num_experts` MLPs, each `intermediate_size` wide.

    Norms, biases and rotary tables are left out: together they are below 0.1% of the weights. An addition and a
    multiplication count as two operations. Raises ValueError for sizes that are no model's.
    """

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool = False
    """The LM head is the embedding table."""
    bytes_per_weight: float = 2
    """May be a fraction, for quantised weights."""
    bytes_per_kv: float = 2
    num_experts: int = 0
    """0 for a dense model."""
    num_experts_per_tok: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("num_experts", "num_experts_per_tok") and type(value) is int and value == 0:
                continue  # dense
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"model {self.name!r}: {field.name} must be a positive integer, not {value!r}")
            if field.type == "float" and (not isinstance(value, (int, float)) or not 0 < value < float("inf")):
                raise ValueError(f"model {self.name!r}: {field.name} must be a positive number, not {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model {self.name!r}: num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.num_experts_per_tok > self.num_experts or bool(self.num_experts) != bool(self.num_experts_per_tok):
            raise ValueError(
                f"model {self.name!r}: num_experts_per_tok={self.num_experts_per_tok} must be from 1 to "
                f"num_experts={self.num_experts}, or both 0 for a dense model"
            )

    @classmethod
    def preset(cls, name: str) -> ModelShape:
        """A known model by name, in bfloat16. Raises ValueError naming the known ones."""
        if name not in PRESETS:
            raise ValueError(f"no model shape {name!r}; there are: {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_dict(cls, sizes: Mapping[str, object]) -> ModelShape:
        """From its fields by name, as `to_dict` gives them. Raises ValueError for missing and unknown ones."""
        known = [field.name for field in fields(cls)]
        unknown = [name for name in sizes if name not in known]
        if unknown:
            raise ValueError(f"a model shape has no {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
        missing = [name for name in known[:8] if name not in sizes]
        if missing:
            raise ValueError(f"a model shape needs {', '.join(missing)}")
        return cls(**sizes)  # type: ignore[arg-type]  # __post_init__ checks the values

    def to_dict(self) -> dict[str, object]:
        """Its fields by name, for a run's record."""
        return asdict(self)

    def in_dtype(self, dtype: str) -> ModelShape:
        """The same model with weights and KV cache in `dtype`: bfloat16, float16 or float32. Raises ValueError."""
        if dtype not in _BYTES:
            raise ValueError(f"no dtype {dtype!r}; there are: {', '.join(_BYTES)}")
        return replace(self, bytes_per_weight=_BYTES[dtype], bytes_per_kv=_BYTES[dtype])

    @property
    def expert_weights(self) -> int:
        """Weights of one expert in every layer; of a dense model, of its MLPs."""
        return self.num_layers * 3 * self.hidden_size * self.intermediate_size

    @property
    def shared_weights(self) -> int:
        """Weights of the linear layers that every token goes through beside its experts: attention and routers."""
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (query + 2 * kv) + query * self.hidden_size
        return self.num_layers * (attention + self.hidden_size * self.num_experts)

    @property
    def linear_weights(self) -> int:
        """Weights of the linear layers, all experts among them and the LM head not."""
        return self.shared_weights + (self.num_experts or 1) * self.expert_weights

    @property
    def active_linear_weights(self) -> int:
        """Weights of the linear layers that one token is multiplied with, the LM head's not among them."""
        return self.shared_weights + (self.num_experts_per_tok or 1) * self.expert_weights

    def experts_hit(self, num_tokens: int) -> float:
        """Expected number of a layer's experts that some token of `num_tokens` goes to; of a dense model 1.

        Each token chooses k of E experts, all equally likely: E * (1 - (1 - k/E)^n). Real routers are less even and
        hit somewhat fewer.
        """
        if not self.num_experts:
            return 1.0
        missed = (1 - self.num_experts_per_tok / self.num_experts) ** num_tokens
        return self.num_experts * (1 - missed)

    @property
    def head_weights(self) -> int:
        """Weights of the LM head, and of the embedding table."""
        return self.vocab_size * self.hidden_size

    @property
    def linear_bytes(self) -> int:
        """Bytes of the linear layers' weights: what every step reads of a dense model, and at most of another."""
        return round(self.linear_weights * self.bytes_per_weight)

    def linear_bytes_read(self, num_tokens: int) -> int:
        """Bytes of the linear layers' weights that a step of `num_tokens` reads: experts that no token hits are not."""
        if not self.num_experts:
            return self.linear_bytes
        weights = self.shared_weights + self.experts_hit(num_tokens) * self.expert_weights
        return round(weights * self.bytes_per_weight)

    @property
    def head_bytes(self) -> int:
        """Bytes of the LM head: what a step reads that samples."""
        return round(self.head_weights * self.bytes_per_weight)

    @property
    def weight_bytes(self) -> int:
        """Memory that all the weights take, the embedding table included."""
        return self.linear_bytes + self.head_bytes * (1 if self.tied_embeddings else 2)

    @property
    def weight_bytes_per_step(self) -> int:
        """Weights that a step reads which samples; of an embedding table of its own it reads a few rows only.

        Of a mixture of experts these are all that a large step reads.
        """
        return self.linear_bytes + self.head_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return round(2 * self.num_layers * self.num_kv_heads * self.head_dim * self.bytes_per_kv)

    @property
    def linear_flops_per_token(self) -> int:
        """Operations of the linear layers for one token, the LM head not among them."""
        return 2 * self.active_linear_weights

    @property
    def head_flops_per_sample(self) -> int:
        """Operations of the LM head for one row."""
        return 2 * self.head_weights

    @property
    def attention_flops_per_pair(self) -> int:
        """Operations of attention for one query and one token of its context: the score, and the weighted value."""
        return 4 * self.num_layers * self.num_heads * self.head_dim


PRESETS: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("tiny", 2, 64, 160, 4, 2, 16, 512, tied_embeddings=True),
        ModelShape("smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152, tied_embeddings=True),
        ModelShape("qwen2.5-0.5b", 24, 896, 4864, 14, 2, 64, 151936, tied_embeddings=True),
        ModelShape("qwen3-0.6b", 28, 1024, 3072, 16, 8, 128, 151936, tied_embeddings=True),
        ModelShape("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256),
        ModelShape("llama-3.1-70b", 80, 8192, 28672, 64, 8, 128, 128256),
        ModelShape("tiny-moe", 2, 64, 32, 4, 2, 16, 512, tied_embeddings=True, num_experts=8, num_experts_per_tok=2),
        ModelShape("qwen3-30b-a3b", 48, 2048, 768, 32, 4, 128, 151936, num_experts=128, num_experts_per_tok=8),
    )
}
"""Sizes from the models' own published configurations; `tiny` and `tiny-moe` are made up, for trying things out."""
