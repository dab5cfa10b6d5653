"""Which part of a model a rank has (Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3).

q, k, v, gate and up are split by their outputs, `o` and `down` by their inputs, so that a layer needs two sums over the
ranks; embedding and LM head by the vocabulary. Norms and an expert layer's router are everywhere.

Shares need not be equal, so that any number of heads can be split. Each rank has whole groups: one KV head or several,
each with all of its query heads. Where there are fewer KV heads than ranks, several ranks have the same KV head, and
share its query heads out among themselves. No rank has more than rank 0, of what a KV cache is made for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from runtime.model_config import ModelConfig, ModelError

UNIT = 16
"""Widths are split in multiples of so much where they are ones: what kernels and aligned loads need."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `size`; the default is all there is."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"there is no rank {self.rank} of {self.size}")

    def share(self, count: int, unit: int = 1) -> range:
        """This rank's of 0, ..., count - 1, in multiples of `unit` if `count` is one and there are enough of them."""
        if count % unit or count < unit * self.size:
            unit = 1
        start, stop = (-(-r * (count // unit) // self.size) * unit for r in (self.rank, self.rank + 1))
        return range(start, stop)


@dataclass(frozen=True, slots=True)
class Slice:
    """The part `kept` of a weight's dimension `dim`, which has `full` entries."""

    dim: int
    kept: range
    full: int


class Layout:
    """A rank's part of a model: which heads, which columns of the MLPs, which tokens of the vocabulary."""

    def __init__(self, config: ModelConfig, shard: Shard) -> None:
        self.shard = shard
        self._full = config
        group = config.num_heads // config.num_kv_heads
        if shard.size <= config.num_kv_heads:
            self.kv_heads = shard.share(config.num_kv_heads)
            self.heads = range(self.kv_heads.start * group, self.kv_heads.stop * group)
        else:
            head = shard.rank * config.num_kv_heads // shard.size
            having = [r for r in range(shard.size) if r * config.num_kv_heads // shard.size == head]
            own = Shard(shard.rank - having[0], len(having)).share(group)
            self.kv_heads = range(head, head + 1)
            self.heads = range(head * group + own.start, head * group + own.stop)
        self.inner = shard.share(config.intermediate_size, UNIT)
        self.vocab_rows = -(-config.vocab_size // shard.size)
        rounded = -(-self.vocab_rows // UNIT) * UNIT
        if shard.size > 1 and rounded * (shard.size - 1) < config.vocab_size:
            self.vocab_rows = rounded
        start = shard.rank * self.vocab_rows
        self.vocab = range(start, max(start, min(config.vocab_size, start + self.vocab_rows)))
        """The rank's tokens; its tables have `vocab_rows` rows, as many on every rank."""

    @property
    def config(self) -> ModelConfig:
        """The shape of the part: heads and widths are the rank's, the vocabulary is the whole one."""
        return replace(
            self._full,
            num_heads=len(self.heads),
            num_kv_heads=len(self.kv_heads),
            intermediate_size=len(self.inner),
            moe_intermediate_size=len(self.inner) if self._full.num_experts else 0,
        )

    def slice_of(self, name: str) -> Slice | None:
        """The part of a weight, by its Hugging Face name, that the rank has; None: all of it."""
        full, size = self._full, self._full.head_dim
        owner = name.split(".")[-2] if "." in name else ""
        if self.shard.size == 1:
            return None
        if owner in ("embed_tokens", "lm_head"):
            return Slice(0, self.vocab, full.vocab_size)
        if owner in ("q_proj", "o_proj"):
            return Slice(int(owner == "o_proj"), _times(self.heads, size), full.q_size)
        if owner in ("k_proj", "v_proj"):
            return Slice(0, _times(self.kv_heads, size), full.kv_size)
        if owner in ("gate_proj", "up_proj", "w1", "w3"):
            return Slice(0, self.inner, full.intermediate_size)
        if owner in ("down_proj", "w2"):
            return Slice(1, self.inner, full.intermediate_size)
        return None


def _times(heads: range, size: int) -> range:
    return range(heads.start * size, heads.stop * size)


def layout_of(config: ModelConfig, shard: Shard) -> Layout:
    """This rank's part. Raises ModelError, on every rank, for a model that so many ranks cannot share."""
    layouts = [Layout(config, Shard(rank, shard.size)) for rank in range(shard.size)]
    for what in ("heads", "inner", "vocab"):
        if not all(getattr(layout, what) for layout in layouts):
            named = {"heads": "attention heads", "inner": "MLP columns", "vocab": "tokens in its vocabulary"}[what]
            raise ModelError(f"the model has too few {named} for {shard.size} ranks; lower --tensor-parallel")
    return layouts[shard.rank]
