"""The forward pass over the paged cache: how tokens are cut, placed and padded changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.attention import get_backend
from runtime.forward import ForwardInputs
from runtime.kv_cache import PagedKVCache
from runtime.models.llama import LlamaModel
from runtime.weights import load_model

PROMPT = [(7 * i * i + 3) % 512 for i in range(120)]


@pytest.fixture(scope="module")
def model() -> LlamaModel:
    """Random weights, spread enough for attention to matter."""
    model = load_model("tiny", load_format="dummy", seed=3).model
    for _, slot in model.weight_slots():
        if slot.dim() == 2:
            slot.mul_(10.0)
    return model


@pytest.fixture(scope="module")
def whole(model: LlamaModel, hand_runner: Any) -> Tensor:
    """Logits of PROMPT in one prefill, contiguous blocks, alone."""
    runner = hand_runner(model, num_blocks=10)
    runner.add(0, PROMPT)
    return runner.step({0: len(PROMPT)})[0]


def assert_same(logits: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_the_reference_logits_depend_on_the_tokens_before_them(
    model: LlamaModel, whole: Tensor, hand_runner: Any
) -> None:
    runner = hand_runner(model, num_blocks=10)
    runner.add(0, [PROMPT[0] + 1, *PROMPT[1:]])
    changed = runner.step({0: len(PROMPT)})[0]
    assert (changed[-1] - whole[-1]).abs().max() > 1e-2


@pytest.mark.parametrize("block_size", [1, 16, 32])
@pytest.mark.parametrize("shuffle", [None, 5])
def test_chunked_prefill_and_decode_equal_one_prefill(
    model: LlamaModel, whole: Tensor, hand_runner: Any, block_size: int, shuffle: int | None
) -> None:
    runner = hand_runner(model, num_blocks=130, block_size=block_size, shuffle=shuffle)
    runner.add(0, PROMPT)
    assert_same(torch.cat([runner.step({0: n})[0] for n in (1, 16, 40, 3, 57, 1, 1, 1)]), whole)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_schedule_of_mixed_sequences_gives_each_the_logits_it_has_alone(
    data: st.DataObject, model: LlamaModel, whole: Tensor, hand_runner: Any
) -> None:
    runner = hand_runner(model, num_blocks=60, shuffle=data.draw(st.integers(0, 99)))
    got: dict[int, list[Tensor]] = {}
    for key in range(data.draw(st.integers(1, 4))):
        runner.add(key, PROMPT)
        got[key] = []
    left = {key: len(PROMPT) for key in got}
    while left:
        chosen = data.draw(st.lists(st.sampled_from(sorted(left)), min_size=1, unique=True))
        sizes = {key: min(left[key], data.draw(st.sampled_from([1, 15, 40, 64]))) for key in chosen}
        for key, logits in runner.step(sizes, pad_rows=data.draw(st.integers(0, 3))).items():
            got[key].append(logits)
            left[key] -= sizes[key]
        left = {key: rest for key, rest in left.items() if rest}
    for parts in got.values():
        assert_same(torch.cat(parts), whole)


@pytest.mark.parametrize("decodes", [1, 3])
def test_padded_rows_and_sequences_harm_nobody(
    model: LlamaModel, whole: Tensor, hand_runner: Any, decodes: int
) -> None:
    runner = hand_runner(model, num_blocks=40)
    for key in range(decodes):
        runner.add(key, PROMPT)
        runner.step({key: 100})
    before = runner.cache.blocks.clone()
    got = runner.step(dict.fromkeys(range(decodes), 1), pad_rows=3, pad_sequences=2)
    for logits in got.values():
        assert_same(logits, whole[100:101])
    touched = (runner.cache.blocks != before).flatten(4).any(-1).any(0).any(0).sum()
    assert touched == decodes  # one slot a sequence


def test_decodes_of_very_different_lengths_share_a_step(model: LlamaModel, hand_runner: Any) -> None:
    lengths = [1, 2, 17, 60, 119, 500, 700]
    long_prompt = [(5 * i * i + i) % 512 for i in range(701)]
    runner = hand_runner(model, num_blocks=200, shuffle=2)
    for key, length in enumerate(lengths):
        runner.add(key, long_prompt)
        if length:
            runner.step({key: length})
    together = runner.step(dict.fromkeys(range(len(lengths)), 1))
    alone = hand_runner(model, num_blocks=50)
    alone.add(0, long_prompt)
    expected = alone.step({0: 701})[0]
    for key, length in enumerate(lengths):
        assert_same(together[key], expected[length : length + 1])


def test_a_sequence_never_reads_another_ones_blocks(model: LlamaModel, whole: Tensor, hand_runner: Any) -> None:
    runner = hand_runner(model, num_blocks=20)
    runner.add(0, PROMPT)
    runner.step({0: 119})
    own = set(runner.sequences[0].blocks)
    others = [block for block in range(20) if block not in own]
    runner.cache.blocks[:, :, others] = float("nan")
    assert_same(runner.step({0: 1})[0], whole[119:])


def test_bfloat16_stays_close_to_float32(whole: Tensor, model: LlamaModel, hand_runner: Any) -> None:
    low = load_model("tiny", load_format="dummy", dtype=torch.bfloat16).model
    source = dict(model.weight_slots())
    for name, slot in low.weight_slots():
        slot.copy_(source[name])
    runner = hand_runner(low, num_blocks=10)
    runner.add(0, PROMPT)
    got = torch.cat([runner.step({0: n})[0] for n in (100, 19, 1)])
    assert got.dtype == torch.bfloat16
    similarity = torch.cosine_similarity(got.float(), whole, dim=-1)
    assert similarity.min() > 0.98


def test_a_model_with_nothing_attached_says_so() -> None:
    model = load_model("tiny", load_format="dummy").model
    empty = torch.zeros(1, dtype=torch.int64)
    inputs = ForwardInputs(empty, empty, empty, empty, empty, empty[None], [1], [1])
    with pytest.raises(RuntimeError, match="attach"):
        model.forward(inputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_gives_the_logits_of_the_cpu(model: LlamaModel, whole: Tensor, hand_runner: Any) -> None:
    on_gpu = LlamaModel(model.config, dtype=torch.float32, device="cuda")
    source = dict(model.weight_slots())
    for name, slot in on_gpu.weight_slots():
        slot.copy_(source[name])
    runner = hand_runner(on_gpu, num_blocks=20, shuffle=1)
    runner.add(0, PROMPT)
    got = torch.cat([runner.step({0: n}, pad_rows=1)[0] for n in (60, 59, 1)])
    torch.testing.assert_close(got.cpu(), whole, atol=1e-2, rtol=1e-3)


def test_every_layer_writes_the_slots_it_is_told_to(model: LlamaModel) -> None:
    cache = PagedKVCache(model.config, 4, 16, dtype=torch.float32, device="cpu")
    model.attach(cache, get_backend("sdpa", "cpu"))
    ids = torch.tensor([5, 6])
    positions = torch.tensor([0, 1])
    lens = torch.tensor([2], dtype=torch.int32)
    table = torch.tensor([[3]], dtype=torch.int32)
    start = torch.tensor([0, 2], dtype=torch.int32)
    model.forward(ForwardInputs(ids, positions, torch.tensor([48, 49]), start, lens, table, [2], [2]))
    for layer in range(model.config.num_layers):
        written = cache.key(layer).abs().sum(dim=(2, 3)) > 0
        assert written.nonzero().tolist() == [[3, 0], [3, 1]]
