"""Our own attention: one family of Triton kernels for prefill, decode and mixed steps. Needs no further package.

Decodes go through `runtime.kernels.attention_decode`, chunks through `runtime.kernels.attention_prefill`; a mixed step
through both. Nothing is read back from the device, so that a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton import next_power_of_2

from policies.shapes import MAX_CAPTURED_CHUNKS
from runtime.forward import ForwardInputs
from runtime.kernels.attention_decode import decode, plan_decodes
from runtime.kernels.attention_prefill import plan_chunks, prefill
from runtime.kernels.launch import num_multiprocessors, use_pdl
from runtime.kv_cache import PagedKVCache

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Launch sizes of the decode kernel: keys a tile, tiles in flight, warps and programs a multiprocessor."""

    block_n: int = 64
    stages: int = 4
    warps: int = 4
    programs: int = 2


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """Launch sizes of the prefill kernel: queries and keys a tile, tiles in flight, warps."""

    block_m: int = 64
    block_n: int = 64
    stages: int = 3
    warps: int = 4


@dataclass(slots=True)
class _Plan:
    inputs: ForwardInputs
    first_tile: Tensor | None = None
    first_seq: Tensor | None = None
    tiles: Tensor | None = None
    num_tiles: Tensor | None = None


class TritonBackend:
    """Attention by Triton kernels; see `runtime.attention.base` for what it computes.

    One instance serves one model on one stream: the parts of cut sequences go through a buffer of its own.
    """

    name = "triton"
    capturable = True
    captures_chunks = True

    def __init__(self, decode_config: DecodeConfig | None = None, prefill_config: PrefillConfig | None = None) -> None:
        self._decode = decode_config
        self._prefill = prefill_config
        self._parts: Tensor | None = None
        self._arrived: Tensor | None = None
        self._kept: list[Tensor] = []  # captured graphs go on using the buffers that others have outgrown

    def prepare(self, inputs: ForwardInputs, kv_cache: PagedKVCache) -> _Plan:
        """Cut the decodes into ranges and list the query tiles of the chunks, both on the device."""
        plan = _Plan(inputs)
        if inputs.num_decodes:
            self._plan_decodes(plan, kv_cache)
        if inputs.decode_count is not None or len(inputs.seq_lens) > inputs.num_decodes:
            self._plan_chunks(plan, kv_cache)
        return plan

    def _plan_decodes(self, plan: _Plan, kv_cache: PagedKVCache) -> None:
        device, num_seqs = kv_cache.device, plan.inputs.num_decodes
        config = self._decode_config(kv_cache, num_seqs)
        ranges = _ranges(kv_cache, config)
        plan.first_tile = torch.empty(num_seqs + 1, dtype=torch.int32, device=device)
        plan.first_seq = torch.empty(ranges + 1, dtype=torch.int32, device=device)
        pdl = use_pdl(device)
        plan_decodes[(1,)](
            plan.inputs.seq_lens, plan.inputs.decode_count, plan.first_tile, plan.first_seq, num_seqs,
            BLOCK_N=config.block_n, RANGES=ranges, RANGES_PAD=next_power_of_2(ranges),
            SEQS_PAD=max(256, next_power_of_2(num_seqs)), PDL=pdl, num_warps=8, launch_pdl=pdl,
        )  # fmt: skip
        if self._arrived is None or self._arrived.numel() < num_seqs * kv_cache.num_kv_heads:
            self._arrived = torch.zeros(max(512, num_seqs) * kv_cache.num_kv_heads, dtype=torch.int32, device=device)
            self._kept.append(self._arrived)

    def _plan_chunks(self, plan: _Plan, kv_cache: PagedKVCache) -> None:
        inputs, first, num_seqs = plan.inputs, plan.inputs.num_decodes, len(plan.inputs.seq_lens)
        device, config = kv_cache.device, self._prefill_config(kv_cache)
        if inputs.host_query_lens is not None:
            num_chunks = num_seqs - first
            bound = sum(-(-n // config.block_m) for n in inputs.host_query_lens[first:])
        else:
            num_chunks = min(MAX_CAPTURED_CHUNKS, num_seqs)
            bound = len(inputs.input_ids) // config.block_m + num_chunks
        plan.tiles = torch.empty((bound, 2), dtype=torch.int32, device=device)
        plan.num_tiles = torch.empty(1, dtype=torch.int32, device=device)
        pdl = use_pdl(device)
        plan_chunks[(num_chunks,)](
            inputs.query_start_loc, inputs.seq_lens, inputs.decode_count, plan.tiles, plan.num_tiles, first, num_chunks,
            num_seqs, BLOCK_M=config.block_m, CHUNKS_PAD=max(16, next_power_of_2(num_chunks)), PDL=pdl, num_warps=1,
            launch_pdl=pdl,
        )  # fmt: skip

    def attend(self, query: Tensor, layer: int, kv_cache: PagedKVCache, plan: object) -> Tensor:
        """query [T, num_heads, head_dim], contiguous -> the same shape."""
        assert isinstance(plan, _Plan)
        out = torch.empty_like(query)
        if plan.first_tile is not None:
            self._attend_decodes(query, layer, kv_cache, plan, out)
        if plan.tiles is not None:
            self._attend_chunks(query, layer, kv_cache, plan, out)
        return out

    def _attend_decodes(self, query: Tensor, layer: int, kv_cache: PagedKVCache, plan: _Plan, out: Tensor) -> None:
        _, heads, dim = query.shape
        kv_heads, inputs = kv_cache.num_kv_heads, plan.inputs
        config = self._decode_config(kv_cache, inputs.num_decodes)
        rows, ranges, padded = max(16, next_power_of_2(heads // kv_heads)), _ranges(kv_cache, config), _padded_dim(dim)
        size = ranges * 2 * kv_heads * rows * (padded + 2)
        if self._parts is None or self._parts.numel() < size:
            self._parts = torch.empty(size, dtype=torch.float32, device=query.device)
            self._kept.append(self._parts)
        key, value = kv_cache.slots(layer)
        pdl = use_pdl(query.device)
        decode[(ranges * kv_heads,)](
            query, key, value, out, inputs.block_table, inputs.block_table.stride(0), inputs.seq_lens,
            plan.first_tile, plan.first_seq, self._parts, self._arrived, inputs.num_decodes, dim**-0.5 * _LOG2_E,
            KV_HEADS=kv_heads, GROUP=heads // kv_heads, ROWS=rows, D=dim, D_PAD=padded,
            BLOCK_SIZE=kv_cache.block_size, BLOCK_N=config.block_n, RANGES=ranges, STAGES=config.stages,
            PDL=pdl, num_warps=config.warps, launch_pdl=pdl,
        )  # fmt: skip

    def _attend_chunks(self, query: Tensor, layer: int, kv_cache: PagedKVCache, plan: _Plan, out: Tensor) -> None:
        _, heads, dim = query.shape
        inputs, config = plan.inputs, self._prefill_config(kv_cache)
        assert plan.tiles is not None
        key, value = kv_cache.slots(layer)
        pdl = use_pdl(query.device)
        prefill[(heads, len(plan.tiles))](
            query, key, value, out, inputs.block_table, inputs.block_table.stride(0), inputs.query_start_loc,
            inputs.seq_lens, plan.tiles, plan.num_tiles, dim**-0.5 * _LOG2_E,
            HEADS=heads, KV_HEADS=kv_cache.num_kv_heads, D=dim, D_PAD=_padded_dim(dim),
            BLOCK_SIZE=kv_cache.block_size, BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.stages,
            PDL=pdl, num_warps=config.warps, launch_pdl=pdl,
        )  # fmt: skip

    def _decode_config(self, kv_cache: PagedKVCache, num_decodes: int) -> DecodeConfig:
        """As measured on an H100 (benchmarks/gpu/attention.py)."""
        if self._decode is not None:
            return self._decode
        if kv_cache.dtype == torch.float32:
            return DecodeConfig(block_n=16, stages=2)  # products are unrolled: small tiles compile in seconds
        if num_decodes <= 4:
            return DecodeConfig(block_n=128, stages=2, warps=8)
        return DecodeConfig(stages=2, programs=4) if num_decodes <= 128 else DecodeConfig()

    def _prefill_config(self, kv_cache: PagedKVCache) -> PrefillConfig:
        if self._prefill is not None:
            return self._prefill
        return PrefillConfig(32, 16, 2, 4) if kv_cache.dtype == torch.float32 else PrefillConfig()


def _ranges(kv_cache: PagedKVCache, config: DecodeConfig) -> int:
    """Ranges that the decodes' tiles are cut into: the device is filled once."""
    return max(1, num_multiprocessors(kv_cache.device) * config.programs // kv_cache.num_kv_heads)


def _padded_dim(dim: int) -> int:
    """tl.dot wants a power of two, 16 at least."""
    return max(16, next_power_of_2(dim))
