"""Which part of a model each rank has, how it is loaded, and how a step is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.device_state import Arrived, StepRows
from runtime.model_config import PRESETS, ModelConfig, ModelError
from runtime.parallel.leader import Leader
from runtime.parallel.ranks import Ranks
from runtime.parallel.shard import Layout, Shard, layout_of
from runtime.parallel.wire import Copied, StepWork, pack, unpack
from runtime.sampling.plain import PlainSampler
from runtime.weights import load_model, safetensors
from tests.runtime.test_tensor_parallel import random_model


def config(heads: int, kv_heads: int, inner: int = 96, vocab: int = 300) -> ModelConfig:
    return ModelConfig(64, inner, 1, heads, kv_heads, 16, vocab, 128)


@given(kv_heads=st.integers(1, 9), group=st.integers(1, 5), inner=st.integers(1, 40), size=st.integers(1, 8))
def test_parts_cover_a_model_once_and_attention_never_crosses_ranks(
    kv_heads: int, group: int, inner: int, size: int
) -> None:
    whole = config(kv_heads * group, kv_heads, inner * 8, 40 * size)
    try:
        parts = [layout_of(whole, Shard(rank, size)) for rank in range(size)]
    except ModelError:  # some rank would have nothing to do
        assert any(not (p.heads and p.inner) for p in (Layout(whole, Shard(rank, size)) for rank in range(size)))
        return
    for name, count in (("heads", kv_heads * group), ("inner", inner * 8), ("vocab", 40 * size)):
        assert [i for part in parts for i in getattr(part, name)] == list(range(count))
    for part in parts:
        local = part.config.num_heads // part.config.num_kv_heads
        assert part.config.num_heads == local * part.config.num_kv_heads
        for k, head in enumerate(part.heads):  # each query head finds its own KV head
            assert part.kv_heads[k // local] == head // group
        assert len(part.kv_heads) <= len(parts[0].kv_heads)


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads"),
    [(2, [6, 3], [2, 1]), (3, [3, 3, 3], [1, 1, 1]), (4, [2, 1, 3, 3], [1, 1, 1, 1]), (9, [1] * 9, [1] * 9)],
)
def test_nine_heads_in_three_groups_are_split_as_evenly_as_groups_allow(
    size: int, heads: list[int], kv_heads: list[int]
) -> None:
    parts = [layout_of(PRESETS["smollm2-135m"], Shard(rank, size)).config for rank in range(size)]
    assert [part.num_heads for part in parts] == heads
    assert [part.num_kv_heads for part in parts] == kv_heads


@pytest.mark.parametrize(
    ("model", "size", "what"),
    [(config(2, 1), 3, "attention heads"), (config(8, 8, 4), 6, "MLP columns"), (config(8, 8, 96, 5), 4, "tokens")],
)
def test_a_model_with_too_little_for_each_rank_is_refused_in_one_line(model: ModelConfig, size: int, what: str) -> None:
    with pytest.raises(ModelError, match=f"too few {what}.* for {size} ranks; lower --tensor-parallel$"):
        layout_of(model, Shard(0, size))


def test_more_ranks_than_cards_are_refused_in_one_line() -> None:
    cards = torch.cuda.device_count()
    with pytest.raises(ModelError, match=rf"^{cards + 1} ranks from cuda:0 on need .* has {cards}; lower --tensor-par"):
        Leader(cards + 1, "cuda:0")


def test_random_weights_are_the_same_however_many_ranks_share_them() -> None:
    whole = dict(load_model("tiny-moe", load_format="dummy", seed=5).model.weight_slots())
    for rank in range(3):
        part = load_model("tiny-moe", load_format="dummy", seed=5, ranks=Ranks(Shard(rank, 3))).model
        for name, slot in part.weight_slots():
            kept = part.layout.slice_of(name)
            expected = whole[name] if kept is None else whole[name].narrow(kept.dim, kept.kept.start, len(kept.kept))
            assert torch.equal(slot, expected), name


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mixtral"])
def test_ranks_together_read_what_is_split_once(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = random_model(family, tmp_path)
    read: dict[str, int] = {}
    original = safetensors.read_tensors

    def counted(source: Path) -> Any:
        for name, tensor in original(source):
            stored = tensor._stored

            class Counting:
                def __getitem__(self, index: Any, stored: Any = stored, name: str = name) -> torch.Tensor:
                    found: torch.Tensor = stored[index]
                    read[name] = read.get(name, 0) + found.numel()
                    return found

            tensor._stored = Counting()
            yield name, tensor

    whole = load_model(folder).model
    sizes = {name: slot.numel() for name, slot in whole.weight_slots()}
    monkeypatch.setattr(safetensors, "read_tensors", counted)
    for rank in range(2):
        load_model(folder, ranks=Ranks(Shard(rank, 2)))
    everywhere = {name for name in sizes if whole_on_every_rank(name)}
    assert everywhere
    assert read == {name: size * (2 if name in everywhere else 1) for name, size in sizes.items()}


def whole_on_every_rank(name: str) -> bool:
    return name.endswith(("norm.weight", ".gate.weight"))


def test_a_step_arrives_as_it_was_sent() -> None:
    rows = StepRows(
        np.array([[3, 0, 17], [4, 2, 2**24]]),
        np.array([3, 4]),
        np.array([0, 9]),
        np.array([7, 1]),
        np.array([1]),
        np.array([5]),
        0,
    )
    keys, heat = np.array([-(2**62) + 1]), np.array([0.7], np.float32)
    arrived = [Arrived(3, [1, 2, 3, 150_000]), Arrived(4, [9])]
    sent = StepWork([Copied(True, (1, 2), (7, 8)), Copied(False, (5,), (0,))], arrived, rows, heat, keys, True, 64)
    got = unpack(pack(sent).tobytes())
    assert (got.copies, got.arrived, got.plain, got.padded_tokens) == (sent.copies, arrived, True, 64)
    assert got.temperature.tolist() == heat.tolist()
    assert got.keys.tolist() == keys.tolist()
    for name in StepRows.__slots__:
        assert np.array_equal(getattr(got.rows, name), getattr(rows, name)), name


def test_a_decode_of_256_sequences_is_told_in_9_kilobytes() -> None:
    all_of_them, one = np.arange(256), np.ones(256, np.int64)
    rows = StepRows(np.empty((0, 3), np.int64), all_of_them, one, one, all_of_them, one, 256)
    work = StepWork([], [], rows, np.zeros(256, np.float32), one, True, None)
    assert pack(work).nbytes == 4 * (9 + 8 * 256) < 9_000
    assert unpack(pack(work).tobytes()).padded_tokens is None


class OtherRanks(Ranks):
    """Gathers what the others have said; who speaks before them hears himself in their place."""

    def __init__(self, shard: Shard, said: list[torch.Tensor]) -> None:
        super().__init__(shard)
        self.said = said

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self.said[self.shard.rank] = x
        return torch.stack([other if len(other) else x for other in self.said])


class Rows:
    """Sampling parameters of three rows, as `DeviceState` has them on the device."""

    parts = {  # noqa: RUF012
        "temperature": torch.tensor([0.0, 0.8, 1.5]),
        "keys": torch.tensor([11, -(2**61), 7]),
        "draws": torch.tensor([0, 3, 90], dtype=torch.int32),
    }

    def part(self, name: str, count: int) -> torch.Tensor:
        return self.parts[name][:count]


def draw_from_parts(seed: int, *, fused: bool) -> tuple[list[int], list[int], int]:
    """Tokens of three rows drawn by one rank, and by three; and the most probable one of the first row."""
    whole, device, rows = config(4, 4), torch.device("cpu"), Rows()
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(seed)).round(decimals=1)  # with ties
    alone, together = torch.empty(3, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
    PlainSampler(Layout(whole, Shard()), Ranks(), device, fused=fused)(logits, rows, alone)  # type: ignore[arg-type]
    said: list[torch.Tensor] = [torch.empty(0)] * 3
    for rank in (2, 1, 0):  # the last one hears them all
        layout = Layout(whole, Shard(rank, 3))
        own = torch.full((3, layout.vocab_rows), torch.nan)  # what follows its own tokens is nothing
        own[:, : len(layout.vocab)] = logits[:, layout.vocab.start : layout.vocab.stop]
        sampler = PlainSampler(layout, OtherRanks(layout.shard, said), device, fused=fused)
        sampler(own, rows, together)  # type: ignore[arg-type]
    return alone.tolist(), together.tolist(), int(logits[0].argmax())


@pytest.mark.parametrize("seed", range(20))
def test_tokens_drawn_from_parts_of_the_vocabulary_are_those_drawn_from_the_whole(seed: int) -> None:
    alone, together, best = draw_from_parts(seed, fused=False)
    assert together == alone
    assert alone[0] == best
