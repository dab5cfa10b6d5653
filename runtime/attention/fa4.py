"""Attention by FlashAttention-4's kernels in CuTe DSL (Dao et al.), of the optional package flash-attn-4.

One call a layer serves the whole step, decodes and chunks alike. Lengths stay on the device, so that a step of decodes
can be captured in a CUDA graph; a call costs the host about 100 us otherwise. Kernels are compiled when they are first
used: seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.forward import ForwardInputs
from runtime.kv_cache import PagedKVCache

_SMALLEST_KEY_TILE = 64


@dataclass(slots=True)
class _Plan:
    query_start_loc: Tensor  # [S + 1] int32
    seq_lens: Tensor  # [S] int32
    block_table: Tensor  # [S, max_blocks] int32


class Fa4Backend:
    """Attention by FlashAttention-4; see `runtime.attention.base` for what it computes."""

    name = "fa4"
    capturable = True
    captures_chunks = False

    def __init__(self) -> None:
        from flash_attn.cute.interface import flash_attn_varlen_func

        self._attend = flash_attn_varlen_func

    def prepare(self, inputs: ForwardInputs, kv_cache: PagedKVCache) -> _Plan:
        """Take what the kernel reads. Raises ValueError for a cache that it cannot read."""
        if kv_cache.dtype not in (torch.float16, torch.bfloat16) or kv_cache.head_dim % 16 or kv_cache.head_dim > 256:
            raise ValueError(
                "attention backend 'fa4' serves float16 and bfloat16 with heads of 16, 32, .. 256, "
                f"not {kv_cache.dtype} with {kv_cache.head_dim}; choose 'triton'"
            )
        table = inputs.block_table
        if kv_cache.block_size >= _SMALLEST_KEY_TILE:
            # Where a block is a key tile the kernel reads a sequence's last entry, the one before its first if the
            # sequence is empty (padding). Let there be something to read.
            table = F.pad(table, (1, 0))[:, 1:]
        return _Plan(inputs.query_start_loc, inputs.seq_lens, table)

    def attend(self, query: Tensor, layer: int, kv_cache: PagedKVCache, plan: object) -> Tensor:
        """query [T, num_heads, head_dim] -> the same shape; rows of no sequence hold anything."""
        assert isinstance(plan, _Plan)
        # No bound on the lengths is given: on Hopper it only chooses between two compiled copies of the same kernel,
        # and the second would be compiled in the middle of serving.
        out, _ = self._attend(
            query,
            kv_cache.key(layer),
            kv_cache.value(layer),
            cu_seqlens_q=plan.query_start_loc,
            seqused_k=plan.seq_lens,
            page_table=plan.block_table,
            causal=True,
        )
        return out
