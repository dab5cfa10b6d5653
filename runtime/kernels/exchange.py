"""Exchanges between the ranks of a model for messages so small that latency is all, with the work that follows them:
sum, residual sum and RMS norm in one kernel; and the best of a row's tokens over all parts of the vocabulary.

Each rank writes its rows straight into memory of the others' cards, every four bytes together with the number of the
exchange in one 8-byte word, and reads what the others write into its own until all words have that number: data and
signal arrive together, so that an exchange takes one way over the link, and there is no barrier. That is NCCL's "LL"
protocol (Hu et al., "Demystifying NCCL", arXiv:2507.04786, section III-D) with every rank sending to every other.

An inbox is int64 [senders, 2, capacity]. Exchanges of the same row use its two halves in turn: who sends the next but
one has had the next one from everybody, who had read this one before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.launch import kernel, use_pdl

WORDS_A_THREAD = 8
"""Fewer threads to a row wait for each other less; more load at a time."""


def words_of(hidden: int, dtype: torch.dtype) -> int:
    """4-byte words in a row."""
    return hidden * dtype.itemsize // 4


@dataclass(frozen=True, slots=True)
class Mail:
    """How rows are exchanged.

    Attributes:
        inboxes: int64 [ranks], the addresses of all inboxes as this rank has them; at each a row of W words has those
            from row * W on.
        capacity: words in half of what a sender has in an inbox.
        counters: int32, one a row at least: exchanges that it has had.
        broken: int32 [1]; when it is not 0, nobody is waited for, and what comes out means nothing.
    """

    rank: int
    inboxes: Tensor
    capacity: int
    counters: Tensor
    broken: Tensor


def sum_add_norm_(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, mail: Mail) -> tuple[Tensor, Tensor]:
    """Adds the sum of all ranks' x [T, H] to the residual in place, and returns it with the norm of the sum as stored.

    Without a residual the sum becomes one. Sums are in float32 and in the order of the ranks, so that they are the same
    on all of them; rounded once.
    """
    rows, hidden = x.shape
    words = words_of(hidden, x.dtype)
    out = torch.empty_like(x)
    total = torch.empty_like(x) if residual is None else residual
    block = triton.next_power_of_2(words)
    pdl = use_pdl(x.device)
    _sum_norm_kernel[(rows,)](
        x, total, weight, out, mail.inboxes, mail.counters, mail.broken, words, hidden, eps, mail.rank,
        len(mail.inboxes), mail.capacity, block, 4 // x.element_size(), residual is not None, pdl,
        num_warps=min(max(block // (32 * WORDS_A_THREAD), 1), 16), launch_pdl=pdl,
    )  # fmt: skip
    return out, total


def merge_draws(scores: Tensor, tokens: Tensor, start: int, vocab_size: int, out: Tensor, mail: Mail) -> None:
    """The token of the best score of each row on any rank, the smallest of equal ones -> out int64 [R].

    scores float32, tokens int32: [R, chunks], of this rank's part of the vocabulary, which begins at token `start`.
    """
    rows, chunks = scores.shape
    pdl = use_pdl(scores.device)
    _merge_kernel[(rows,)](
        scores, tokens, out, mail.inboxes, mail.counters, mail.broken, start, vocab_size, chunks, mail.rank,
        len(mail.inboxes), mail.capacity, triton.next_power_of_2(chunks), pdl, num_warps=1, launch_pdl=pdl,
    )  # fmt: skip


@triton.jit
def _halves(word, DTYPE: tl.constexpr):
    """The two 16-bit numbers of words, in float32."""
    low = (word & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
    high = ((word >> 16) & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _word(low, high, DTYPE: tl.constexpr):
    """The words of two numbers each, both rounded to 16 bits."""
    low = low.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = high.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (low | (high << 16)).to(tl.int32, bitcast=True)


@triton.jit
def _receive(inbox, sequence, mask, broken):
    """The payload of words, as soon as all of them have come."""
    word = tl.load(inbox, mask, 0, volatile=True)
    late = tl.sum(((((word >> 32).to(tl.int32)) != sequence) & mask).to(tl.int32))
    while late > 0:
        stop = tl.load(broken, volatile=True)  # on its way together with the words
        word = tl.load(inbox, mask, 0, volatile=True)
        late = tl.sum(((((word >> 32).to(tl.int32)) != sequence) & mask).to(tl.int32))
        late = tl.where(stop != 0, 0, late)
    return word.to(tl.int32)


@triton.jit
def _inboxes(inboxes, SIZE: tl.constexpr):
    """The addresses of all inboxes, asked for before there is anything to send."""
    found = ()  # type: tuple
    for rank in tl.static_range(SIZE):
        found = found + (tl.multiple_of(tl.load(inboxes + rank).to(tl.pointer_type(tl.int64)), 16),)  # noqa: RUF005
    return found


@kernel
@triton.jit
def _sum_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    inboxes: tl.tensor,
    counters: tl.tensor,
    broken: tl.tensor,
    WORDS: tl.constexpr,
    HIDDEN: tl.constexpr,
    EPS: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_WORD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row."""
    if PDL:
        gdc_launch_dependents()
    DTYPE: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < WORDS
    at = row.to(tl.int64) * WORDS + column
    words = tl.pointer_type(tl.int32)
    scale = tl.load(weight.to(words) + column, mask, 0)
    to = _inboxes(inboxes, SIZE)
    if PDL:
        gdc_wait()
    sequence = tl.load(counters + row) + 1
    mine = tl.load(x.to(words) + at, mask, 0)

    # In turn into either half of the part that is this rank's in each of the other inboxes.
    half = (sequence & 1).to(tl.int64) * CAPACITY + at
    numbered = (sequence.to(tl.int64) << 32) | (mine.to(tl.int64) & 0xFFFFFFFF)
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            tl.store(to[peer] + RANK * 2 * CAPACITY + half, numbered, mask)

    if HAS_RESIDUAL:
        before = tl.load(residual.to(words) + at, mask, 0)
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for sender in tl.static_range(SIZE):
        word = mine
        if sender != RANK:
            word = _receive(to[RANK] + sender * 2 * CAPACITY + half, sequence, mask, broken)
        if PER_WORD == 2:
            add_low, add_high = _halves(word, DTYPE)
            low += add_low
            high += add_high
        else:
            low += word.to(tl.float32, bitcast=True)
    tl.store(counters + row, sequence)

    if PER_WORD == 2:
        if HAS_RESIDUAL:
            add_low, add_high = _halves(before, DTYPE)
            low += add_low
            high += add_high
        total = _word(low, high, DTYPE)
        tl.store(residual.to(words) + at, total, mask)
        low, high = _halves(total, DTYPE)
        inverse_rms = tl.rsqrt(tl.sum(low * low + high * high) / HIDDEN + EPS)
        scale_low, scale_high = _halves(scale, DTYPE)
        normed = _word(low * inverse_rms * scale_low, high * inverse_rms * scale_high, DTYPE)
    else:
        if HAS_RESIDUAL:
            low += before.to(tl.float32, bitcast=True)
        tl.store(residual.to(words) + at, low.to(tl.int32, bitcast=True), mask)
        inverse_rms = tl.rsqrt(tl.sum(low * low) / HIDDEN + EPS)
        normed = (low * inverse_rms * scale.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    tl.store(out.to(words) + at, normed, mask)


@triton.jit
def _better(score, token, best_score, best_token):
    """The better one of two, the smaller token of equal ones; a score that is no number is worse than any."""
    wins = (score > best_score) | ((score == best_score) & (token < best_token))
    return tl.where(wins, score, best_score), tl.where(wins, token, best_token)


@kernel
@triton.jit
def _merge_kernel(
    scores: tl.tensor,
    tokens: tl.tensor,
    out: tl.tensor,
    inboxes: tl.tensor,
    counters: tl.tensor,
    broken: tl.tensor,
    START: tl.constexpr,
    VOCAB: tl.constexpr,
    CHUNKS: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row, which exchanges two words: the best score of a rank, and its token."""
    if PDL:
        gdc_launch_dependents()
    to = _inboxes(inboxes, SIZE)
    if PDL:
        gdc_wait()
    row = tl.program_id(0)
    chunk = tl.arange(0, BLOCK)
    mask = chunk < CHUNKS
    sequence = tl.load(counters + row) + 1
    score = tl.load(scores + row * CHUNKS + chunk, mask, float("-inf"))
    token = tl.load(tokens + row * CHUNKS + chunk, mask, 0x7FFFFFFF)
    own_score = tl.max(score)
    own_token = tl.minimum(tl.min(tl.where(score == own_score, token, 0x7FFFFFFF)), VOCAB - 1 - START) + START

    which = tl.arange(0, 2)
    both = which < 2
    at = (sequence & 1).to(tl.int64) * CAPACITY + row * 2 + which
    word = tl.where(which == 0, own_score.to(tl.int32, bitcast=True), own_token)
    numbered = (sequence.to(tl.int64) << 32) | (word.to(tl.int64) & 0xFFFFFFFF)
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            tl.store(to[peer] + RANK * 2 * CAPACITY + at, numbered, both)
    best_score = tl.full((), float("-inf"), tl.float32)
    best_token = tl.full((), VOCAB - 1, tl.int32)
    for sender in tl.static_range(SIZE):
        if sender != RANK:
            word = _receive(to[RANK] + sender * 2 * CAPACITY + at, sequence, both, broken)
            that_score = tl.sum(tl.where(which == 0, word, 0)).to(tl.float32, bitcast=True)
            that_token = tl.sum(tl.where(which == 1, word, 0))
            best_score, best_token = _better(that_score, that_token, best_score, best_token)
        else:
            best_score, best_token = _better(own_score, own_token, best_score, best_token)
    tl.store(counters + row, sequence)
    tl.store(out + row, best_token.to(tl.int64))
