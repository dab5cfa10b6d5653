"""Attention of one query token a sequence over the paged cache: split-KV with perfect balance, in one launch.

The KV tiles of all sequences, laid end to end, are cut into as many equal ranges as there are programs for a KV head
(stream-K; for attention: LeanAttention, Sanovar et al., arXiv:2405.10480). A range covers the end of one sequence,
some whole ones and the beginning of another. Whole sequences are written at once; of a sequence that is cut, the
program that comes last puts the parts together, in order, as in FlashDecoding (Dao et al., 2023). The cuts are found
on the device from `seq_lens`, so that a captured graph stays right whatever the lengths are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.launch import kernel


@kernel
@triton.jit(do_not_specialize=["num_seqs"])
def plan_decodes(
    seq_lens,  # [S] int32
    decode_count,  # [1] int32: so many of the sequences are decodes; None: all of them
    first_tile,  # [S + 1] int32, out: tiles before each sequence
    first_seq,  # [RANGES + 1] int32, out: the sequence in which each range begins; then the tiles of a range
    num_seqs,
    BLOCK_N: tl.constexpr,
    RANGES: tl.constexpr,
    RANGES_PAD: tl.constexpr,
    SEQS_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Cut the tiles into ranges. One program."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    seqs = tl.arange(0, SEQS_PAD)
    mine = seqs < num_seqs
    if decode_count is not None:
        mine = mine & (seqs < tl.load(decode_count))
    tiles = (tl.load(seq_lens + seqs, mask=mine, other=0) + BLOCK_N - 1) // BLOCK_N
    ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    share = (total + RANGES - 1) // RANGES
    tl.store(first_tile + seqs, ends - tiles, mask=seqs < num_seqs)
    tl.store(first_tile + num_seqs, total)
    tl.store(first_seq + RANGES, share)
    AT_ONCE: tl.constexpr = max(1, min(RANGES_PAD, 16384 // SEQS_PAD))  # what fits into registers
    for first in range(0, RANGES_PAD, AT_ONCE):
        ranges = first + tl.arange(0, AT_ONCE)
        ended = (ends[None, :] <= (ranges * share)[:, None]) & (seqs[None, :] < num_seqs)
        tl.store(first_seq + ranges, tl.sum(ended.to(tl.int32), 1), mask=ranges < RANGES)


@triton.jit
def _attend_tiles(
    q,
    key,
    value,
    table,
    low,
    high,
    seq_len,
    kv_head,
    scale,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Tiles low .. high of one sequence: (row maxima, row sums, unnormalised output)."""
    dims = tl.arange(0, D_PAD)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    # The block ids of a tile are loaded a tile ahead, so that the keys and values need not wait for them.
    tokens = low * BLOCK_N + tl.arange(0, BLOCK_N)
    next_page = tl.load(table + tokens // BLOCK_SIZE, mask=tokens < seq_len, other=0)
    for tile in tl.range(low, high, num_stages=STAGES):
        tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        seen = tokens < seq_len
        page = next_page
        later = tokens + BLOCK_N
        next_page = tl.load(table + later // BLOCK_SIZE, mask=later < seq_len, other=0)
        slot = page.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
        rows = slot * (KV_HEADS * D) + kv_head * D
        inside = seen[:, None] & (dims < D)[None, :] if D != D_PAD else seen[:, None]
        k = tl.load(key + rows[:, None] + dims[None, :], mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        scores = tl.where(seen[None, :], scores, float("-inf"))
        now_best = tl.maximum(best, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - now_best[:, None])
        fade = tl.exp2(best - now_best)
        v = tl.load(value + rows[:, None] + dims[None, :], mask=inside, other=0.0)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * fade[:, None], input_precision="ieee")
        best = now_best
    return best, total, acc


@kernel
@triton.jit(do_not_specialize=["table_stride", "num_seqs"])
def decode(
    query,  # [S, heads, D], contiguous
    key,  # [slots, KV_HEADS, D]
    value,
    out,  # like query
    block_table,  # [S, columns] int32
    table_stride,
    seq_lens,  # [S] int32
    first_tile,  # from plan_decodes
    first_seq,
    parts,  # [RANGES, 2, KV_HEADS, ROWS, D_PAD + 2] float32: sums, then maxima and row sums
    arrived,  # [S, KV_HEADS] int32, zero before and after
    num_seqs,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANGES: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs: KV head fastest, so that the heads of a token are read together.

    Long for its arguments: what follows is one loop over the sequences of a range.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    kv_head = tl.program_id(0) % KV_HEADS
    piece = tl.program_id(0) // KV_HEADS
    share = tl.load(first_seq + RANGES)
    total_tiles = tl.load(first_tile + num_seqs)
    tile = piece * share
    range_end = tl.minimum(tile + share, total_tiles)
    seq = tl.load(first_seq + piece)
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, D_PAD)
    mine = (rows < GROUP)[:, None] & (dims < D)[None, :]
    part_size = ROWS * (D_PAD + 2)
    while tile < range_end:
        low = tl.load(first_tile + seq)
        high = tl.load(first_tile + seq + 1)
        end = tl.minimum(high, range_end)
        if end > tile:
            offsets = (seq.to(tl.int64) * KV_HEADS * GROUP + kv_head * GROUP + rows)[:, None] * D + dims[None, :]
            q = tl.load(query + offsets, mask=mine, other=0.0)
            best, total, acc = _attend_tiles(
                q, key, value, block_table + seq.to(tl.int64) * table_stride, tile - low, end - low,
                tl.load(seq_lens + seq), kv_head, scale,
                KV_HEADS, D, D_PAD, ROWS, BLOCK_SIZE, BLOCK_N, STAGES,
            )  # fmt: skip
            if (tile == low) & (end == high):
                tl.store(out + offsets, (acc / total[:, None]).to(out.dtype.element_ty), mask=mine)
            else:
                # A range has at most two cut sequences: one that began before it, one that ends after it.
                side = (tile == low).to(tl.int32)
                part = parts + ((piece * 2 + side) * KV_HEADS + kv_head).to(tl.int64) * part_size
                tl.store(part + rows[:, None] * D_PAD + dims[None, :], acc)
                tl.store(part + ROWS * D_PAD + rows, best)
                tl.store(part + ROWS * (D_PAD + 1) + rows, total)
                tl.debug_barrier()  # everything is written before this program says so
                first = low // share
                last = (high - 1) // share
                before = tl.atomic_add(arrived + seq * KV_HEADS + kv_head, 1, sem="acq_rel")
                if before == last - first:
                    best = tl.full([ROWS], float("-inf"), tl.float32)
                    total = tl.zeros([ROWS], tl.float32)
                    acc = tl.zeros([ROWS, D_PAD], tl.float32)
                    for other in range(first, last + 1):
                        side = (other * share <= low).to(tl.int32)
                        part = parts + ((other * 2 + side) * KV_HEADS + kv_head).to(tl.int64) * part_size
                        sums = tl.load(part + rows[:, None] * D_PAD + dims[None, :], cache_modifier=".cg")
                        part_best = tl.load(part + ROWS * D_PAD + rows, cache_modifier=".cg")
                        part_total = tl.load(part + ROWS * (D_PAD + 1) + rows, cache_modifier=".cg")
                        now_best = tl.maximum(best, part_best)
                        fade = tl.exp2(best - now_best)
                        weight = tl.exp2(part_best - now_best)
                        acc = acc * fade[:, None] + sums * weight[:, None]
                        total = total * fade + part_total * weight
                        best = now_best
                    tl.store(out + offsets, (acc / total[:, None]).to(out.dtype.element_ty), mask=mine)
                    tl.store(arrived + seq * KV_HEADS + kv_head, 0)
            tile = end
        seq += 1
