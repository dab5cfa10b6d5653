"""KV blocks between the paged cache, where each layer's keys and values lie apart, and whole blocks one after another.

A block's part in one layer's keys or values is a *piece*: `words` int64 in a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.kernels.launch import kernel


@kernel
@triton.jit(do_not_specialize=["piece_stride", "words"])
def move_blocks(cache, packed, block_ids, piece_stride, words, GATHER: tl.constexpr, BLOCK: tl.constexpr):
    """Copy blocks of a cache [pieces, blocks, words] to `packed` [n, pieces, words] (GATHER), or back.

    Programs: (block, piece). `piece_stride`: words from one piece's first block to the next one's.
    """
    n = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1).to(tl.int64)
    block = tl.load(block_ids + n).to(tl.int64)
    there = cache + piece * piece_stride + block * words
    here = packed + (n * tl.num_programs(1) + piece) * words
    for start in range(0, words, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if GATHER:
            tl.store(here + i, tl.load(there + i, mask=i < words, other=0), mask=i < words)
        else:
            tl.store(there + i, tl.load(here + i, mask=i < words, other=0), mask=i < words)
