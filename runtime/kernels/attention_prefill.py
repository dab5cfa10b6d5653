"""Causal attention of prefill chunks over the paged cache (FlashAttention-2; Dao, arXiv:2307.08691).

A program takes a tile of queries of one sequence and one head, and goes over the keys that the tile sees. A decode is
a chunk of one token and is right here too, only slower than in `attention_decode`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.launch import kernel


@kernel
@triton.jit(do_not_specialize=["first", "num_chunks", "num_seqs"])
def plan_chunks(
    query_start_loc,  # [S + 1] int32
    seq_lens,  # [S] int32
    decode_count,  # [1] int32: the first sequence that is a chunk; None: it is `first`
    tiles,  # [bound, 2] int32, out: (sequence, first query in it)
    num_tiles,  # [1] int32, out
    first,
    num_chunks,  # at most
    num_seqs,
    BLOCK_M: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """List the query tiles of all chunks, one program a chunk; the last queries, which see most keys, first."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    mine = tl.program_id(0)
    chunks = tl.arange(0, CHUNKS_PAD)
    if decode_count is not None:
        first = tl.load(decode_count)
    there = (chunks < num_chunks) & (first + chunks < num_seqs)
    begin = tl.load(query_start_loc + first + chunks, mask=there, other=0)
    end = tl.load(query_start_loc + first + chunks + 1, mask=there, other=0)
    length = tl.load(seq_lens + first + chunks, mask=there, other=0)
    counts = tl.where(length > 0, (end - begin + BLOCK_M - 1) // BLOCK_M, 0)
    before = tl.sum(tl.where(chunks < mine, counts, 0), 0)
    count = tl.sum(tl.where(chunks == mine, counts, 0), 0)
    for i in range(count):
        tl.store(tiles + 2 * (before + i), first + mine)
        tl.store(tiles + 2 * (before + i) + 1, (count - 1 - i) * BLOCK_M)
    if mine == 0:
        tl.store(num_tiles, tl.sum(counts, 0))


@triton.jit
def _cache_slots(table, start, seq_len, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """Where the keys start .. start + BLOCK_N lie, [BLOCK_N] int64. A block's id is looked up once where it can be."""
    if BLOCK_N % BLOCK_SIZE == 0:
        blocks = start // BLOCK_SIZE + tl.arange(0, BLOCK_N // BLOCK_SIZE)
        if MASKED:
            ids = tl.load(table + blocks, mask=blocks * BLOCK_SIZE < seq_len, other=0)
        else:
            ids = tl.load(table + blocks)
        first = ids.to(tl.int64) * BLOCK_SIZE
        return tl.reshape(first[:, None] + tl.arange(0, BLOCK_SIZE)[None, :], [BLOCK_N])
    tokens = start + tl.arange(0, BLOCK_N)
    if BLOCK_SIZE % BLOCK_N == 0:
        return tl.load(table + start // BLOCK_SIZE).to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
    ids = tl.load(table + tokens // BLOCK_SIZE, mask=tokens < seq_len, other=0)
    return ids.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE


@triton.jit
def _over_keys(
    q,
    acc,
    best,
    total,
    key,
    value,
    table,
    low,
    high,
    last_seen,  # [BLOCK_M]: the last key each query sees
    seq_len,
    kv_head,
    scale,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Keys low .. high; all of them are seen by all queries unless MASKED."""
    dims = tl.arange(0, D_PAD)
    for start in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        tokens = start + tl.arange(0, BLOCK_N)
        there = tokens < seq_len
        slots = _cache_slots(table, start, seq_len, BLOCK_SIZE, BLOCK_N, MASKED)
        rows = slots * (KV_HEADS * D) + kv_head * D
        where = rows[:, None] + dims[None, :]
        if MASKED:
            inside = there[:, None] & (dims < D)[None, :] if D != D_PAD else there[:, None]
            k = tl.load(key + where, mask=inside, other=0.0)
            v = tl.load(value + where, mask=inside, other=0.0)
        elif D != D_PAD:
            k = tl.load(key + where, mask=(dims < D)[None, :], other=0.0)
            v = tl.load(value + where, mask=(dims < D)[None, :], other=0.0)
        else:
            k = tl.load(key + where)
            v = tl.load(value + where)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if MASKED:
            scores = tl.where(tokens[None, :] <= last_seen[:, None], scores, float("-inf"))
        now_best = tl.maximum(best, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - now_best[:, None])
        fade = tl.exp2(best - now_best)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * fade[:, None], input_precision="ieee")
        best = now_best
    return acc, best, total


@kernel
@triton.jit(do_not_specialize=["table_stride"])
def prefill(
    query,  # [T, heads, D], contiguous
    key,  # [slots, KV_HEADS, D]
    value,
    out,  # like query
    block_table,  # [S, columns] int32
    table_stride,
    query_start_loc,
    seq_lens,
    tiles,  # from plan_chunks
    num_tiles,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs: (head, tile); heads of a KV head side by side, so that its keys come from the L2 cache."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    tile = tl.program_id(1)
    if tile < tl.load(num_tiles):
        seq = tl.load(tiles + 2 * tile)
        first_query = tl.load(tiles + 2 * tile + 1)
        begin = tl.load(query_start_loc + seq)
        num_queries = tl.load(query_start_loc + seq + 1) - begin
        seq_len = tl.load(seq_lens + seq)
        history = seq_len - num_queries
        queries = first_query + tl.arange(0, BLOCK_M)
        dims = tl.arange(0, D_PAD)
        mine = (queries < num_queries)[:, None] & (dims < D)[None, :]
        offsets = ((begin + queries).to(tl.int64) * HEADS + head)[:, None] * D + dims[None, :]
        q = tl.load(query + offsets, mask=mine, other=0.0)
        last_seen = history + tl.minimum(queries, num_queries - 1)
        acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        table = block_table + seq.to(tl.int64) * table_stride
        kv_head = head // (HEADS // KV_HEADS)
        seen_by_all = (history + first_query + 1) // BLOCK_N * BLOCK_N
        high = history + tl.minimum(first_query + BLOCK_M, num_queries)
        acc, best, total = _over_keys(
            q, acc, best, total, key, value, table, 0, seen_by_all, last_seen, seq_len, kv_head, scale,
            KV_HEADS, D, D_PAD, BLOCK_SIZE, BLOCK_N, STAGES, False,
        )  # fmt: skip
        acc, best, total = _over_keys(
            q, acc, best, total, key, value, table, seen_by_all, high, last_seen, seq_len, kv_head, scale,
            KV_HEADS, D, D_PAD, BLOCK_SIZE, BLOCK_N, STAGES, True,
        )  # fmt: skip
        tl.store(out + offsets, (acc / total[:, None]).to(out.dtype.element_ty), mask=mine)
