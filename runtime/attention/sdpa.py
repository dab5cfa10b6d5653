"""The reference attention: gather each sequence's blocks, then PyTorch's scaled_dot_product_attention.

Runs on any device PyTorch runs on. Prefill chunks are attended one by one; decodes together, in groups of
similar length, padded under a mask. A sequence's rows read that sequence's blocks and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.forward import ForwardInputs
from runtime.kv_cache import PagedKVCache

_FP8 = torch.float8_e4m3fn
# Padded tokens one group of decodes may gather; on a CPU, 2,000 to 4,000 measured fastest.
_MAX_GATHERED_TOKENS = 4096


@dataclass(slots=True)
class _Chunk:
    """One sequence's prefill chunk."""

    rows: slice
    blocks: Tensor  # [n] int64
    seq_len: int
    mask: Tensor | None  # [queries, seq_len], added to the scores; None: plainly causal


@dataclass(slots=True)
class _DecodeGroup:
    """Decodes of similar length, one query each."""

    rows: Tensor  # [B] int64
    blocks: Tensor  # [B * n] int64
    mask: Tensor  # [B, 1, 1, n * block_size], added to the scores


@dataclass(slots=True)
class _Plan:
    chunks: list[_Chunk]
    groups: list[_DecodeGroup]
    gathered: Tensor  # [2, blocks of the widest group, block_size, num_kv_heads, head_dim]


@dataclass(frozen=True, slots=True)
class _Decode:
    """Where one decode is in the step."""

    row: int
    seq: int
    seq_len: int


class SdpaBackend:
    """Attention by gathering blocks; see `runtime.attention.base` for what it computes."""

    name = "sdpa"
    capturable = False
    captures_chunks = False

    def prepare(self, inputs: ForwardInputs, kv_cache: PagedKVCache) -> _Plan:
        """Split the step into prefill chunks and groups of decodes; build their indices and masks."""
        chunks: list[_Chunk] = []
        decodes: list[_Decode] = []
        row = 0
        assert inputs.host_query_lens is not None, "the reference cannot run in a CUDA graph"
        assert inputs.host_seq_lens is not None
        lengths = zip(inputs.host_query_lens, inputs.host_seq_lens, strict=True)
        for seq, (query_len, seq_len) in enumerate(lengths):
            if query_len == 1 and seq_len > 0:
                decodes.append(_Decode(row, seq, seq_len))
            elif query_len > 0 and seq_len > 0:
                blocks = inputs.block_table[seq, : _blocks(seq_len, kv_cache)].long()
                mask = _chunk_mask(query_len, seq_len, kv_cache)
                chunks.append(_Chunk(slice(row, row + query_len), blocks, seq_len, mask))
            row += query_len
        groups = [_decode_group(group, inputs.block_table, kv_cache) for group in _similar(decodes)]
        widest = max((len(group.blocks) for group in groups), default=0)
        # One buffer for all layers: a fresh one a layer costs more in page faults than the gathering itself.
        return _Plan(chunks, groups, kv_cache.key(0).new_empty((2, widest, *kv_cache.key(0).shape[1:])))

    def attend(self, query: Tensor, layer: int, kv_cache: PagedKVCache, plan: object) -> Tensor:
        """query [T, num_heads, head_dim] -> the same shape; padded rows are zero.

        What is gathered of a float8 cache is converted to the query's type.
        """
        assert isinstance(plan, _Plan)
        key_blocks, value_blocks = kv_cache.key(layer), kv_cache.value(layer)
        out = torch.zeros_like(query)
        for chunk in plan.chunks:
            key = key_blocks[chunk.blocks].flatten(0, 1)[: chunk.seq_len]
            value = value_blocks[chunk.blocks].flatten(0, 1)[: chunk.seq_len]
            out[chunk.rows] = _attend_chunk(query[chunk.rows], key, value, chunk.mask)
        for group in plan.groups:
            key, value = plan.gathered[:, : len(group.blocks)]
            torch.index_select(key_blocks, 0, group.blocks, out=key)
            torch.index_select(value_blocks, 0, group.blocks, out=value)
            out[group.rows] = _attend_decodes(query[group.rows], key, value, group.mask)
        return out


def _blocks(seq_len: int, kv_cache: PagedKVCache) -> int:
    return -(-seq_len // kv_cache.block_size)


def _similar(decodes: Sequence[_Decode]) -> list[list[_Decode]]:
    """Groups of similar length: padding at most doubles the work, and what is gathered stays in cache."""
    groups: list[list[_Decode]] = []
    for decode in sorted(decodes, key=lambda decode: (-decode.seq_len, decode.row)):
        if groups:
            longest = groups[-1][0].seq_len
            fits = (len(groups[-1]) + 1) * longest <= _MAX_GATHERED_TOKENS
            if fits and 2 * decode.seq_len >= longest:
                groups[-1].append(decode)
                continue
        groups.append([decode])
    return groups


def _mask_dtype(kv_cache: PagedKVCache) -> torch.dtype:
    """The query's type but for a float8 cache, which does not tell it, and has no infinity."""
    return torch.bfloat16 if kv_cache.dtype == _FP8 else kv_cache.dtype


def _chunk_mask(query_len: int, seq_len: int, kv_cache: PagedKVCache) -> Tensor | None:
    if query_len == seq_len:
        return None
    mask = torch.full((query_len, seq_len), float("-inf"), dtype=_mask_dtype(kv_cache), device=kv_cache.device)
    return mask.triu_(diagonal=seq_len - query_len + 1)


def _decode_group(group: Sequence[_Decode], block_table: Tensor, kv_cache: PagedKVCache) -> _DecodeGroup:
    device, block_size = kv_cache.device, kv_cache.block_size
    width = _blocks(max(decode.seq_len for decode in group), kv_cache)
    rows = torch.tensor([decode.row for decode in group], device=device)
    seqs = torch.tensor([decode.seq for decode in group], device=device)
    lengths = torch.tensor([[decode.seq_len] for decode in group], device=device)
    table = block_table[seqs, :width].long()
    # Past a sequence's end the table may hold anything: read its own first block there, and mask it.
    used = torch.arange(width, device=device) * block_size < lengths
    table = torch.where(used, table, table[:, :1])
    hidden = torch.arange(width * block_size, device=device) >= lengths
    mask = torch.zeros(hidden.shape, dtype=_mask_dtype(kv_cache), device=device).masked_fill_(hidden, float("-inf"))
    return _DecodeGroup(rows, table.flatten(), mask[:, None, None, :])


def _attend_chunk(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """query [n, num_heads, d], key and value [L, num_kv_heads, d] -> [n, num_heads, d]."""
    q, k, v = (x.to(query.dtype).transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    mask = None if mask is None else mask.to(query.dtype)
    gqa = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
    return out.squeeze(0).transpose(0, 1)


def _attend_decodes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """query [B, num_heads, d], key and value [B * n, block_size, num_kv_heads, d] -> [B, num_heads, d].

    The query heads that share a KV head are the query rows of one attention, so that K and V are not
    repeated.
    """
    batch, heads, dim = query.shape
    kv_heads = key.shape[2]
    k, v = (x.to(query.dtype).reshape(batch, -1, kv_heads, dim).transpose(1, 2) for x in (key, value))
    mask = mask.to(query.dtype)
    out = F.scaled_dot_product_attention(query.view(batch, kv_heads, -1, dim), k, v, attn_mask=mask)
    return out.reshape(batch, heads, dim)
