"""Backends of optional packages, pairs of backends by phase, and the choice by measurement."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from runtime import attention
from runtime.attention import AttentionShape, backend_names, get_backend
from runtime.attention.base import AttentionBackend
from runtime.attention.flashinfer import FlashInferBackend
from runtime.attention.sdpa import SdpaBackend
from runtime.attention.split import SplitBackend
from runtime.forward import ForwardInputs
from runtime.kv_cache import PagedKVCache
from runtime.model_config import ModelConfig

CUDA = torch.cuda.is_available()
OPTIONAL = {"flashinfer": "flashinfer", "fa4": "flash_attn"}


def make_cache(block_size: int = 4, dtype: torch.dtype = torch.float32, head_dim: int = 8) -> PagedKVCache:
    config = ModelConfig(
        hidden_size=8, intermediate_size=8, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=head_dim,
        vocab_size=8, max_model_len=64,
    )  # fmt: skip
    torch.manual_seed(0)
    cache = PagedKVCache(config, 40, block_size, dtype=dtype, device="cpu")
    cache.blocks.copy_(torch.randn(cache.blocks.shape))
    return cache


def make_inputs(
    query_lens: Sequence[int], seq_lens: Sequence[int], cache: PagedKVCache, num_decodes: int
) -> ForwardInputs:
    """Shuffled blocks, and ids of no block past the end of every table."""
    order = torch.randperm(cache.num_blocks).tolist()
    counts = [-(-n // cache.block_size) for n in seq_lens]
    table = [[order.pop() for _ in range(n)] + [10**6] * (max(counts) + 1 - n) for n in counts]
    tokens = torch.arange(sum(query_lens))
    return ForwardInputs(
        tokens, tokens, tokens,
        torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32),
        torch.tensor(seq_lens, dtype=torch.int32),
        torch.tensor(table, dtype=torch.int32),
        query_lens, seq_lens, num_decodes,
    )  # fmt: skip


def attend(backend: AttentionBackend, query: Tensor, inputs: ForwardInputs, cache: PagedKVCache) -> Tensor:
    return backend.attend(query, 0, cache, backend.prepare(inputs, cache))


# Names


def test_the_backend_that_needs_no_package_is_asked_first_and_the_reference_last() -> None:
    assert backend_names() == ["triton", "flashinfer", "fa4", "sdpa"]


@pytest.mark.parametrize("name", OPTIONAL)
def test_an_optional_backend_says_on_a_cpu_which_card_it_needs(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' cannot run on cpu: its .* need a Hopper .*GPU"):
        get_backend(name, "cpu")


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_missing_package_is_named_with_the_command_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_capability", lambda device: 9)
    monkeypatch.setattr(attention, "_is_installed", lambda module: False)
    with pytest.raises(ValueError, match=rf"the package \S+ is missing; pip install 'diptych\[{name}\]'$"):
        get_backend(name, "cuda")


def test_a_package_counts_as_missing_when_its_parent_is() -> None:
    assert not attention._is_installed("no_such_package.cute")
    assert attention._is_installed("torch.cuda")


def test_each_phase_can_have_a_backend_by_name() -> None:
    backend = get_backend("decode=sdpa, prefill=sdpa", "cpu")
    assert isinstance(backend, SplitBackend)
    assert backend.name == "prefill=sdpa,decode=sdpa"


def test_a_phase_left_out_is_auto() -> None:
    assert get_backend("decode=sdpa", "cpu").name == f"prefill={get_backend('auto', 'cpu').name},decode=sdpa"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("verify=sdpa", "unknown phase 'verify' in attention 'verify=sdpa'; known: prefill, decode"),
        ("prefill=sdpa,sdpa", "unknown phase 'sdpa' .*; known: prefill, decode"),
        ("prefill=flash9", "unknown attention backend 'flash9'; known: auto, .*sdpa"),
        ("prefill=sdpa,decode=", "unknown attention backend ''; known: auto, .*sdpa"),
        ("decode=fa4", "'fa4' cannot run on cpu"),
    ],
)
def test_a_wrong_pair_is_refused_with_what_is_known(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_backend(name, "cpu")


def test_fastest_is_auto_where_there_is_nothing_to_choose_between() -> None:
    assert get_backend("fastest", "cpu").name == get_backend("auto", "cpu").name


def test_fastest_needs_a_shape_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_usable", lambda device: ["triton", "fa4", "sdpa"])
    with pytest.raises(ValueError, match="measured for a model's shape"):
        get_backend("fastest", "cuda")


# Pairs

STEPS = {
    "decodes": ([1, 1, 1], [5, 17, 1], 3),
    "chunks": ([5, 3], [5, 11], 0),
    "mixed": ([1, 1, 6, 4, 1], [9, 2, 6, 13, 7], 2),
    "mixed with padding": ([1, 1, 1, 5, 2], [9, 0, 3, 5, 0], 3),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_pair_of_the_reference_equals_the_reference(step: str) -> None:
    query_lens, seq_lens, num_decodes = STEPS[step]
    cache = make_cache()
    inputs = make_inputs(query_lens, seq_lens, cache, num_decodes)
    query = torch.randn(sum(query_lens), 4, 8)
    pair = SplitBackend(SdpaBackend(), SdpaBackend())
    torch.testing.assert_close(attend(pair, query, inputs, cache), attend(SdpaBackend(), query, inputs, cache))


class Recorded(SdpaBackend):
    """Notes the steps it is given."""

    def __init__(self) -> None:
        self.steps: list[ForwardInputs] = []

    def prepare(self, inputs: ForwardInputs, kv_cache: PagedKVCache) -> object:  # type: ignore[override]
        self.steps.append(inputs)
        return super().prepare(inputs, kv_cache)


def test_each_backend_of_a_pair_is_given_its_own_part_as_a_whole_step() -> None:
    cache = make_cache()
    inputs = make_inputs([1, 1, 6, 4], [9, 2, 6, 13], cache, 2)
    prefill, decode = Recorded(), Recorded()
    attend(SplitBackend(prefill, decode), torch.randn(12, 4, 8), inputs, cache)
    (chunks,), (decodes,) = prefill.steps, decode.steps
    assert (decodes.host_query_lens, decodes.host_seq_lens, decodes.num_decodes) == ([1, 1], [9, 2], 2)
    assert (chunks.host_query_lens, chunks.host_seq_lens, chunks.num_decodes) == ([6, 4], [6, 13], 0)
    assert decodes.query_start_loc.tolist() == [0, 1, 2]
    assert chunks.query_start_loc.tolist() == [0, 6, 10]
    assert chunks.input_ids.tolist() == list(range(2, 12))
    for part in (decodes, chunks):
        assert len(part.block_table) == len(part.seq_lens) == 2


def test_a_pair_can_be_captured_when_its_decodes_can() -> None:
    class Captured(SdpaBackend):
        capturable = True

    assert SplitBackend(SdpaBackend(), Captured()).capturable
    assert not SplitBackend(Captured(), SdpaBackend()).capturable


# What the optional backends make of a step, which needs neither the package nor a card


def test_flashinfer_is_told_of_the_blocks_of_each_part_alone() -> None:
    cache = make_cache(dtype=torch.bfloat16, head_dim=64)
    inputs = make_inputs([1, 1, 1, 6, 3], [9, 0, 4, 6, 13], cache, 3)
    plan = FlashInferBackend().prepare(inputs, cache)
    assert plan.decodes is not None
    assert plan.chunks is not None
    assert plan.chunk_starts is not None
    table = inputs.block_table.tolist()
    assert plan.decodes.indptr.tolist() == [0, 3, 4, 5]
    assert plan.decodes.indices.tolist() == [*table[0][:3], 0, table[2][0]]  # padding reads block 0
    assert plan.decodes.last_page_len.tolist() == [1, 1, 4]
    assert plan.chunks.indptr.tolist() == [0, 2, 6]
    assert plan.chunks.indices.tolist() == [*table[3][:2], *table[4][:4]]
    assert plan.chunks.last_page_len.tolist() == [2, 1]
    assert plan.chunk_starts.tolist() == [0, 6, 9]
    assert (plan.num_decodes, plan.num_rows) == (3, 12)
    for tensor in (plan.decodes.indptr, plan.decodes.indices, plan.decodes.last_page_len, plan.chunk_starts):
        assert tensor.dtype == torch.int32


def test_flashinfer_refuses_a_cache_it_cannot_read() -> None:
    cache = make_cache()
    with pytest.raises(ValueError, match=r"'flashinfer' serves float16 and bfloat16 .*, not torch.float32 with 8"):
        FlashInferBackend().prepare(make_inputs([1], [3], cache, 1), cache)


# On the card


def on_card(name: str) -> AttentionBackend:
    if importlib.util.find_spec(OPTIONAL[name]) is None:
        pytest.skip(f"the package of {name} is missing")
    return get_backend(name, "cuda")


needs_card = pytest.mark.skipif(not CUDA, reason="needs a CUDA card")


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("heads", [32, 16])
def test_every_kind_of_step_equals_attention_written_out(name: str, block_size: int, heads: int) -> None:
    from tests.runtime.kernels.test_attention import check  # imports Triton, too early where it is interpreted

    backend = on_card(name)
    lengths = torch.randint(1, 3000, (40,), generator=torch.Generator().manual_seed(heads)).tolist()
    for query_lens, seq_lens, num_decodes in [
        ([1], [300], 1),
        ([1] * 40, lengths, 40),
        ([1] * 5, [0, 33, 0, 700, 0], 5),
        ([300, 17, 1], [300, 900, 5], 0),
        ([1] * 20 + [700, 5, 129], [*lengths[:20], 700, 2005, 1000], 20),
        ([1, 1, 1, 64, 1], [200, 0, 31, 64, 0], 3),
    ]:
        check(query_lens, seq_lens, num_decodes, heads, 8, 128, block_size, torch.bfloat16, backend)  # type: ignore[arg-type]


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("batch", [8, 300])  # above 256 sequences FlashAttention-4 launches further kernels
def test_fa4_in_a_graph_follows_the_lengths_on_the_device(block_size: int, batch: int) -> None:
    from tests.runtime.kernels import test_attention as written

    backend = on_card("fa4")
    torch.manual_seed(block_size)
    cache = written.make_cache(32, 8, 128, batch * (1024 // block_size), block_size, torch.bfloat16)
    seq_lens = [int(n) for n in torch.randint(1, 1024, (batch,))]
    real = written.make_inputs([1] * batch, [1024] * batch, cache, batch)
    query = torch.randn(batch, 32, 128, device="cuda").bfloat16()
    captured = replace(
        real, host_query_lens=None, host_seq_lens=None, seq_lens=torch.zeros_like(real.seq_lens),
        block_table=torch.zeros_like(real.block_table),
    )  # fmt: skip
    attend(backend, query, captured, cache)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(backend, query, captured, cache)
    seq_lens[-2:] = [0, 0]
    captured.seq_lens.copy_(torch.tensor(seq_lens))
    captured.block_table.copy_(real.block_table)
    graph.replay()
    expected = written.written_out(query, 0, cache, replace(real, host_seq_lens=seq_lens))
    assert written.error(out, expected, torch.tensor(seq_lens) > 0) < 5e-3


@pytest.mark.gpu
@needs_card
def test_the_fastest_pair_is_right(caplog: pytest.LogCaptureFixture) -> None:
    from tests.runtime.kernels.test_attention import check

    caplog.set_level("INFO")
    backend = get_backend("fastest", "cuda", AttentionShape(32, 8, 128, 16, torch.bfloat16))
    print(backend.name, *caplog.messages, sep="\n")
    assert backend.capturable
    check([1, 1, 40], [200, 31, 64], 2, 32, 8, 128, 16, torch.bfloat16, backend)  # type: ignore[arg-type]
