"""The Triton attention against attention written out in float64, on every kind of step."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from runtime.attention.triton import DecodeConfig, PrefillConfig, TritonBackend
from runtime.forward import ForwardInputs
from runtime.kv_cache import PagedKVCache
from runtime.model_config import ModelConfig

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Triton's interpreter knows no product of bfloat16 matrices.
HALF = torch.bfloat16 if CUDA else torch.float16
DECODE, PREFILL = DecodeConfig(block_n=16), PrefillConfig(block_m=16, block_n=16, warps=4)


def make_cache(
    heads: int, kv_heads: int, dim: int, num_blocks: int, block_size: int, dtype: torch.dtype
) -> PagedKVCache:
    config = ModelConfig(
        hidden_size=64, intermediate_size=8, num_layers=2, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim,
        vocab_size=8, max_model_len=64,
    )  # fmt: skip
    cache = PagedKVCache(config, num_blocks, block_size, dtype=dtype, device=DEVICE)
    cache.blocks.copy_(torch.randn(cache.blocks.shape, device=DEVICE))
    return cache


def make_inputs(query_lens: list[int], seq_lens: list[int], cache: PagedKVCache, num_decodes: int) -> ForwardInputs:
    """Shuffled blocks, and junk past the end of every table."""
    order = torch.randperm(cache.num_blocks).tolist()
    width = max(-(-n // cache.block_size) for n in seq_lens) + 2
    table = []
    for n in seq_lens:
        used = [order.pop() for _ in range(-(-n // cache.block_size))]
        table.append(used + [10**6] * (width - len(used)))
    unread = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    return ForwardInputs(
        unread, unread, unread,
        torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32, device=DEVICE),
        torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE),
        torch.tensor(table, dtype=torch.int32, device=DEVICE),
        query_lens, seq_lens, num_decodes,
    )  # fmt: skip


def written_out(query: Tensor, layer: int, cache: PagedKVCache, inputs: ForwardInputs) -> Tensor:
    assert inputs.host_query_lens is not None
    assert inputs.host_seq_lens is not None
    out, row = torch.zeros(query.shape, dtype=torch.float64), 0
    heads, dim = query.shape[1:]
    for seq, (n, length) in enumerate(zip(inputs.host_query_lens, inputs.host_seq_lens, strict=True)):
        if length:
            table = inputs.block_table[seq, : math.ceil(length / cache.block_size)].long()
            k, v = (
                x[table].flatten(0, 1)[:length].cpu().double().repeat_interleave(heads // cache.num_kv_heads, 1)
                for x in (cache.key(layer), cache.value(layer))
            )
            q = query[row : row + n].cpu().double()
            scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(dim)
            hidden = torch.arange(length)[None, :] > torch.arange(length - n, length)[:, None]
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            out[row : row + n] = torch.einsum("hqk,khd->qhd", weights, v)
        row += n
    return out


def as_captured(inputs: ForwardInputs) -> ForwardInputs:
    """The same step without lengths on the host: where the decodes end is on the device alone."""
    count = torch.tensor([inputs.num_decodes], dtype=torch.int32, device=DEVICE)
    unread = torch.zeros(int(inputs.query_start_loc[-1]), dtype=torch.int64, device=DEVICE)
    rest = {"host_query_lens": None, "host_seq_lens": None, "num_decodes": len(inputs.seq_lens)}
    return replace(inputs, input_ids=unread, decode_count=count, **rest)


def error(out: Tensor, expected: Tensor, rows: Tensor) -> float:
    difference = (out.cpu().double() - expected)[rows]
    return float(difference.norm() / expected[rows].norm())


def check(
    query_lens: list[int], seq_lens: list[int], num_decodes: int, heads: int, kv_heads: int, dim: int,
    block_size: int, dtype: torch.dtype, backend: TritonBackend | None = None, captured: bool = False,
    layers: tuple[int, ...] = (0, 1, 0) if CUDA else (1,),
) -> None:  # fmt: skip
    torch.manual_seed(sum(seq_lens) + heads)
    num_blocks = sum(-(-n // block_size) for n in seq_lens) + 1
    cache = make_cache(heads, kv_heads, dim, num_blocks, block_size, dtype)
    inputs = make_inputs(query_lens, seq_lens, cache, num_decodes)
    query = torch.randn(sum(query_lens), heads, dim).to(DEVICE, dtype)
    backend = backend or (TritonBackend() if CUDA else TritonBackend(DECODE, PREFILL))
    given = as_captured(inputs) if captured else inputs
    real = torch.cat([torch.full((n,), length > 0) for n, length in zip(query_lens, seq_lens, strict=True)])
    for layer in layers:
        out = backend.attend(query, layer, cache, backend.prepare(given, cache))
        bound = 1e-5 if dtype == torch.float32 else 5e-3
        assert error(out, written_out(query, layer, cache, inputs), real) < bound


HEADS = [(4, 4, 16), (6, 2, 16), (9, 3, 64), (4, 1, 24), (8, 4, 128)]
SHAPES = [(*heads, torch.float32) for heads in HEADS]
SHAPES += [(*heads, HALF) for heads in (HEADS if CUDA else HEADS[2:4])]  # the interpreter takes seconds for each
of_every_shape = pytest.mark.parametrize(("heads", "kv_heads", "dim", "dtype"), SHAPES)


@of_every_shape
def test_decodes_equal_attention_written_out(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    check([1] * 6, [33, 1, 100, 0, 16, 47], 6, heads, kv_heads, dim, 16, dtype)


@pytest.mark.parametrize("block_size", [8, 16, 24, 32, 64, 128])
def test_every_block_size_serves_decodes_and_chunks(block_size: int) -> None:
    check([1, 1, 20, 3], [130, 70, 20, 131], 2, 4, 2, 16, block_size, torch.float32)


@pytest.mark.parametrize("lengths", [[1], [300], [5, 300], [300, 5, 1, 64], [0, 0, 40], [16] * 20])
def test_decodes_are_right_wherever_they_are_cut(lengths: list[int]) -> None:
    """More than once: the counters of cut sequences must be as they were before."""
    check([1] * len(lengths), lengths, len(lengths), 4, 2, 16, 16, torch.float32, layers=(0, 1, 0) if CUDA else (1, 0))


@of_every_shape
def test_chunks_equal_attention_written_out(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    check([18, 16, 1, 5], [18, 34, 20, 53], 0, heads, kv_heads, dim, 16, dtype)


def test_a_mixed_step_with_padding_equals_attention_written_out() -> None:
    check([1, 1, 1, 40, 7, 1], [60, 9, 33, 40, 80, 0], 3, 6, 2, 32, 16, HALF)


@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "num_decodes"),
    [
        ([1, 1, 1, 40, 7, 1, 0, 0], [60, 9, 33, 40, 80, 0, 0, 0], 3),
        ([33, 16, 90], [33, 50, 0], 0),  # no decodes
        ([1, 1, 20], [60, 9, 0], 2),  # no chunks
        ([1, 1, 30, 0], [60, 9, 30, 0], 2),  # no padding
        ([1] * 70 + [3] * 64, [20] * 2 + [5] * 68 + [3] * 64, 70),
    ],
)
def test_a_step_whose_cut_is_on_the_device_equals_attention_written_out(
    query_lens: list[int], seq_lens: list[int], num_decodes: int
) -> None:
    kv_heads = 2 if len(query_lens) < 100 else 1
    check(query_lens, seq_lens, num_decodes, 2 * kv_heads, kv_heads, 16, 16, torch.float32, captured=True)


def test_buffers_that_a_captured_graph_may_use_outlive_larger_ones() -> None:
    backend = TritonBackend(DECODE, PREFILL)
    cache = make_cache(4, 2, 16, 40, 16, torch.float32)
    few = make_inputs([1, 1], [30, 20], cache, 2)
    backend.attend(torch.randn(2, 4, 16, device=DEVICE), 0, cache, backend.prepare(few, cache))
    used = {buffer.data_ptr() for buffer in (backend._arrived, backend._parts) if buffer is not None}
    many = make_inputs([1] * 600, [1] * 600, make_cache(4, 2, 16, 601, 16, torch.float32), 600)
    backend.prepare(many, cache)
    assert used < {buffer.data_ptr() for buffer in backend._kept}


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA card")
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (16, 8, 128), (9, 3, 64), (64, 8, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_shapes_on_the_card(block_size: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(block_size)
    decodes = torch.randint(1, 3000, (70,), generator=generator).tolist()
    for num in (1, 3, 70):
        check([1] * num, decodes[:num], num, heads, kv_heads, dim, block_size, dtype)
    check([1] * 30 + [700, 129, 5], [*decodes[:30], 700, 1000, 2005], 30, heads, kv_heads, dim, block_size, dtype)
    check([1, 1, 300], [8000, 16, 300], 2, heads, kv_heads, dim, block_size, dtype)
