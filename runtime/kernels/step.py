"""From what the host sends of a step to what the model reads: tokens, positions, cache slots, block tables.

The host's part is one int32 buffer; `runtime.device_state` says what lies where in it (the offsets are constants here).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.launch import kernel


@kernel
@triton.jit(do_not_specialize=["arrivals_at", "tokens_stride"])
def scatter_tokens(upload, tokens, arrivals_at, tokens_stride, BLOCK: tl.constexpr):
    """Known tokens of requests that got a slot. Programs: (arrival, block of tokens).

    An arrival is four numbers from `arrivals_at` on: slot, first position, number of tokens, where they lie.
    """
    entry = upload + arrivals_at + 4 * tl.program_id(0)
    slot = tl.load(entry).to(tl.int64)
    first = tl.load(entry + 1)
    count = tl.load(entry + 2)
    source = tl.load(entry + 3)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = tl.load(upload + source + i, mask=i < count, other=0)
    tl.store(tokens + slot * tokens_stride + first + i, known, mask=i < count)


@kernel
@triton.jit
def scatter_blocks(upload, block_tables, COLUMNS: tl.constexpr, COUNT_AT: tl.constexpr, BLOCK: tl.constexpr):
    """New entries of block tables, each three numbers: slot, column, block id. One program."""
    count = tl.load(upload + COUNT_AT)
    source = tl.load(upload + COUNT_AT + 1)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        there = i < count
        slot = tl.load(upload + source + 3 * i, mask=there, other=0).to(tl.int64)
        column = tl.load(upload + source + 3 * i + 1, mask=there, other=0)
        block = tl.load(upload + source + 3 * i + 2, mask=there, other=0)
        tl.store(block_tables + slot * COLUMNS + column, block, mask=there)


@kernel
@triton.jit(do_not_specialize=["tokens_stride"])
def expand_rows(
    upload,
    tokens,  # [slots, tokens_stride] int32
    tokens_stride,
    block_tables,  # [slots, COLUMNS] int32
    input_ids,  # out, [T] int64
    positions,  # out, [T] int64
    slot_mapping,  # out, [T] int64
    seq_lens,  # out, [S] int32
    table,  # out, [S, COLUMNS] int32
    SLOTS_AT: tl.constexpr,
    STARTS_AT: tl.constexpr,
    QUERY_START_AT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs: (sequence, block of its tokens). Slot -1 is padding: a sequence of one token, written nowhere."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    seq = tl.program_id(0)
    slot = tl.load(upload + SLOTS_AT + seq).to(tl.int64)
    start = tl.load(upload + STARTS_AT + seq)
    row = tl.load(upload + QUERY_START_AT + seq)
    count = tl.load(upload + QUERY_START_AT + seq + 1) - row
    real = slot >= 0
    slot = tl.maximum(slot, 0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine = i < count
    known_here = i < tl.where(real, count, 0)
    position = start + i
    known = tl.load(tokens + slot * tokens_stride + position, mask=known_here, other=0)
    block = tl.load(block_tables + slot * COLUMNS + position // BLOCK_SIZE, mask=known_here, other=0).to(tl.int64)
    tl.store(input_ids + row + i, known.to(tl.int64), mask=mine)
    tl.store(positions + row + i, tl.where(real, position, 0).to(tl.int64), mask=mine)
    tl.store(slot_mapping + row + i, tl.where(real, block * BLOCK_SIZE + position % BLOCK_SIZE, -1), mask=mine)
    if tl.program_id(1) == 0:
        length = tl.where(real, start + count, 0)
        tl.store(seq_lens + seq, length)
        for first in range(0, (length + BLOCK_SIZE - 1) // BLOCK_SIZE, 256):
            column = first + tl.arange(0, 256)
            used = column < COLUMNS
            entry = tl.load(block_tables + slot * COLUMNS + column, mask=used, other=0)
            tl.store(table + seq.to(tl.int64) * COLUMNS + column, entry, mask=used)


@kernel
@triton.jit(do_not_specialize=["count", "tokens_stride"])
def store_tokens(
    upload,
    sampled,  # [R] int64
    tokens,
    tokens_stride,
    count,
    SLOTS_AT: tl.constexpr,
    POSITIONS_AT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sampled tokens go where the next step reads them. Slot -1 is a padded row."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    slot = tl.load(upload + SLOTS_AT + i, mask=there, other=-1).to(tl.int64)
    position = tl.load(upload + POSITIONS_AT + i, mask=there, other=0)
    token = tl.load(sampled + i, mask=there, other=0)
    tl.store(tokens + slot * tokens_stride + position, token.to(tl.int32), mask=there & (slot >= 0))
