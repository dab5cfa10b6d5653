"""Attention by FlashInfer's kernels (Ye et al., arXiv:2501.01005), of the optional package flashinfer-python.

Decodes and chunks go through one wrapper each. A wrapper cuts the step's work on the host (`plan`), so that a step
cannot be captured in a CUDA graph. The kernels are built by nvcc when they are first used: a minute or two.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.forward import ForwardInputs
from runtime.kv_cache import PagedKVCache

_WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends for the parts of cut sequences
_HEAD_DIMS = (64, 128, 256)


@dataclass(slots=True)
class _Pages:
    """The blocks of some sequences, one after the other: sequence i has indices[indptr[i] : indptr[i + 1]]."""

    indptr: Tensor  # [n + 1] int32, on the host
    indices: Tensor  # [total] int32
    last_page_len: Tensor  # [n] int32, tokens in each sequence's last block; on the host


@dataclass(slots=True)
class _Plan:
    num_decodes: int
    num_rows: int
    decodes: _Pages | None
    chunks: _Pages | None
    chunk_starts: Tensor | None  # [chunks + 1] int32, first row of each, counted from the first chunk's; on the host


class FlashInferBackend:
    """Attention by FlashInfer; see `runtime.attention.base` for what it computes.

    One instance serves one model on one stream: all steps go through one workspace.
    """

    name = "flashinfer"
    capturable = False
    captures_chunks = False

    def __init__(self) -> None:
        self._decode: Any = None
        self._prefill: Any = None
        self._planned: _Plan | None = None
        self._sent: torch.cuda.Event | None = None

    def prepare(self, inputs: ForwardInputs, kv_cache: PagedKVCache) -> _Plan:
        """List the blocks of the decodes and of the chunks. Raises ValueError for a cache FlashInfer cannot read."""
        if kv_cache.dtype not in (torch.float16, torch.bfloat16) or kv_cache.head_dim not in _HEAD_DIMS:
            raise ValueError(
                f"attention backend 'flashinfer' serves float16 and bfloat16 with heads of {_HEAD_DIMS}, "
                f"not {kv_cache.dtype} with {kv_cache.head_dim}; choose 'triton'"
            )
        assert inputs.host_query_lens is not None, "FlashInfer plans on the host and cannot run in a CUDA graph"
        first, num_seqs = inputs.num_decodes, len(inputs.host_query_lens)
        starts = [0, *itertools.accumulate(inputs.host_query_lens[first:])]
        return _Plan(
            first,
            first + starts[-1],
            _pages(inputs, 0, first, kv_cache) if first else None,
            _pages(inputs, first, num_seqs, kv_cache) if first < num_seqs else None,
            torch.tensor(starts, dtype=torch.int32) if first < num_seqs else None,
        )

    def attend(self, query: Tensor, layer: int, kv_cache: PagedKVCache, plan: object) -> Tensor:
        """query [T, num_heads, head_dim], contiguous -> the same shape."""
        assert isinstance(plan, _Plan)
        if self._planned is not plan:
            self._send(plan, query, kv_cache)
            self._planned = plan
        out, first, end = torch.empty_like(query), plan.num_decodes, plan.num_rows
        pages = kv_cache.key(layer), kv_cache.value(layer)
        if plan.decodes is not None:
            self._decode.run(query[:first], pages, out=out[:first])
        if plan.chunks is not None:
            self._prefill.run(query[first:end], pages, out=out[first:end])
        return out

    def _send(self, plan: _Plan, query: Tensor, kv_cache: PagedKVCache) -> None:
        """Plan on the host and start the copies of the plans to the device. The number of heads is known here only."""
        if self._decode is None:
            self._make_wrappers(query.device)
        if self._sent is None:
            self._sent = torch.cuda.Event()
        else:
            self._sent.synchronize()  # a wrapper plans in one pinned buffer, and the last plan may still wait there
        heads, types = query.shape[1], {"q_data_type": query.dtype, "kv_data_type": kv_cache.dtype}
        shape = heads, kv_cache.num_kv_heads, kv_cache.head_dim, kv_cache.block_size
        if (pages := plan.decodes) is not None:
            self._decode.plan(pages.indptr, pages.indices, pages.last_page_len, *shape, **types)
        if (pages := plan.chunks) is not None:
            self._prefill.plan(
                plan.chunk_starts, pages.indptr, pages.indices, pages.last_page_len, *shape, causal=True, **types
            )
        self._sent.record()

    def _make_wrappers(self, device: torch.device) -> None:
        import flashinfer

        workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        # Decodes use the tensor cores too: the query heads of a KV head are the rows of a tile.
        self._decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        self._prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa3")


def _pages(inputs: ForwardInputs, first: int, end: int, kv_cache: PagedKVCache) -> _Pages:
    """The blocks of sequences first to end. The indices are gathered on the device, with no round trip.

    A padded sequence is given block 0, as many keys as it has queries: FlashInfer then needs no case for it.
    """
    assert inputs.host_query_lens is not None
    assert inputs.host_seq_lens is not None
    size = kv_cache.block_size
    lengths = list(map(max, inputs.host_query_lens[first:end], inputs.host_seq_lens[first:end]))
    counts = [-(-n // size) for n in lengths]
    last = [n - max(count - 1, 0) * size for n, count in zip(lengths, counts, strict=True)]
    indptr = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    total = sum(counts)
    starts = indptr.to(kv_cache.device, non_blocking=True)
    seq = torch.repeat_interleave(starts.diff(), output_size=total)
    column = torch.arange(total, dtype=torch.int32, device=kv_cache.device) - starts[seq]
    blocks = inputs.block_table[first:end][seq, column]
    indices = torch.where(inputs.seq_lens[first:end][seq] > 0, blocks, 0)
    return _Pages(indptr, indices, torch.tensor(last, dtype=torch.int32))
