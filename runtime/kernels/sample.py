"""Temperature, Gumbel noise and argmax in one reading of the logits.

The noise is that of `runtime.sampling.noise`, bit for bit on a card, so that a request draws the same tokens
whether its row is sampled here or by the `Sampler`. Two logarithms for each entry would take longer than the
reading, so entries are first scored with approximate ones, and only those whose approximate score could be the
best get the exact one: one entry in most blocks. The result is that of exact scores throughout.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, libdevice

from runtime.kernels.launch import kernel, use_pdl

_FEW_ROWS = 16  # up to here a row is cut finer, for more programs
_NO_TOKEN = tl.constexpr(0x7FFFFFFF)


def sample(
    logits: Tensor, temperature: Tensor, keys: Tensor, positions: Tensor, hashed_vocab: Tensor, out: Tensor
) -> None:
    """Draws a token from softmax(logits / temperature) for each row; of equal scores the smallest token wins.

    Args:
        logits: [R, V]; rows may be spaced. NaN is not allowed.
        temperature: float32 [R]; 0 takes the most probable token.
        keys: int64 [R], and `positions` int64 or int32 [R], the output position: they number the draw.
        hashed_vocab: int32 [V], `runtime.sampling.noise.vocab_hash`.
        out: int64 [R], filled with the tokens.
    """
    if not len(logits):
        return
    scores, tokens = score_chunks(logits, temperature, keys, positions, hashed_vocab)
    merge_chunks(scores, tokens, logits.shape[1], out)


def score_chunks(
    logits: Tensor,
    temperature: Tensor,
    keys: Tensor,
    positions: Tensor,
    hashed_vocab: Tensor,
    *,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The best score and its token of each chunk of each row: float32 and int32, both [R, chunks].

    Arguments as of `sample`. `width`: chunks are cut as for so many tokens; those that are not there score -inf.
    """
    rows, vocab = logits.shape
    block = 2048 if rows <= _FEW_ROWS else 4096
    chunks = triton.cdiv(width or vocab, block)
    scores = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    tokens = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    pdl = use_pdl(logits.device)
    _chunk_kernel[(rows * chunks,)](
        logits,
        logits.stride(0),
        temperature,
        keys,
        positions,
        hashed_vocab,
        scores,
        tokens,
        vocab,
        chunks,
        block,
        logits.is_cuda,
        pdl,
        num_warps=block // 512,
        launch_pdl=pdl,
    )
    return scores, tokens


def merge_chunks(scores: Tensor, tokens: Tensor, vocab_size: int, out: Tensor) -> None:
    """The token of the best score of each row, the smallest of equal ones: [R, chunks] both -> out int64 [R]."""
    rows, chunks = scores.shape
    pdl = use_pdl(scores.device)
    _merge_kernel[(rows,)](
        scores, tokens, out, vocab_size, chunks, triton.next_power_of_2(chunks), pdl, num_warps=1, launch_pdl=pdl
    )


@kernel
@triton.jit
def _chunk_kernel(
    logits: tl.tensor,
    row_stride: tl.tensor,
    temperature: tl.tensor,
    keys: tl.tensor,
    positions: tl.tensor,
    hashed_vocab: tl.tensor,
    scores: tl.tensor,
    tokens: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    ON_CARD: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """The best score and its token among BLOCK entries of one row."""
    if PDL:
        gdc_launch_dependents()
    program = tl.program_id(0)
    row = program // CHUNKS
    start = (program % CHUNKS) * BLOCK
    token = start + tl.arange(0, BLOCK)
    mask = token < VOCAB
    hashed = tl.load(hashed_vocab + token, mask, 0)
    if PDL:
        gdc_wait()
    row_logits = logits + row.to(tl.int64) * row_stride
    heat = tl.load(temperature + row)
    logit = tl.load(row_logits + token, mask, float("-inf")).to(tl.float32)
    if heat > 0:
        low, high = _row_bits(tl.load(keys + row), tl.load(positions + row).to(tl.int64))
        rough = logit * (1.0 / heat) + _rough_gumbel(_uniform(hashed, low, high), ON_CARD)
        top = tl.max(rough)
        # Rough and exact scores differ by less than half of this: 5e-5 in the noise, and the rounding of a
        # quotient of up to |top| + 23. The minimum keeps an infinite top from making it infinite.
        slack = 2e-4 + 1e-6 * tl.minimum(tl.abs(top), 1e38)
        candidate = (rough >= top - slack) & (rough > float("-inf"))
        best_score = tl.full((), float("-inf"), tl.float32)
        best_token = start
        current = tl.min(tl.where(candidate, token, _NO_TOKEN))
        while current < VOCAB:
            noise = _gumbel(_uniform(tl.load(hashed_vocab + current), low, high), ON_CARD)
            score = tl.div_rn(tl.load(row_logits + current).to(tl.float32), heat) + noise
            better = score > best_score
            best_score = tl.where(better, score, best_score)
            best_token = tl.where(better, current, best_token)
            current = tl.min(tl.where(candidate & (token > current), token, _NO_TOKEN))
    else:
        best_score = tl.max(logit)
        best_token = tl.min(tl.where(logit == best_score, token, _NO_TOKEN))
    tl.store(scores + program, best_score)
    tl.store(tokens + program, best_token)


@kernel
@triton.jit
def _merge_kernel(
    scores: tl.tensor,
    tokens: tl.tensor,
    out: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """The best of one row's chunks; a token of the vocabulary also where a model that overflows gives NaN."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    chunk = tl.arange(0, BLOCK)
    mask = chunk < CHUNKS
    score = tl.load(scores + row * CHUNKS + chunk, mask, float("-inf"))
    token = tl.load(tokens + row * CHUNKS + chunk, mask, _NO_TOKEN)
    best = tl.min(tl.where(score == tl.max(score), token, _NO_TOKEN))
    tl.store(out + row, tl.minimum(best, VOCAB - 1).to(tl.int64))


@triton.jit
def _row_bits(key: tl.tensor, position: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The low and the high half of `noise.row_bits`, uint32."""
    z = key.to(tl.uint64, bitcast=True) + (position + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return z.to(tl.uint32), (z >> 32).to(tl.uint32)


@triton.jit
def _uniform(hashed: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """The uniform numbers of `noise.gumbel`, float32."""
    x = (hashed.to(tl.uint32, bitcast=True) + low) * (high | 1)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = (x ^ (x >> 16)) & 0x7FFFFFFF
    u = (x.to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2**-31
    return tl.minimum(u, 0.9999999403953552)  # 1 - 2**-24


@triton.jit
def _gumbel(u: tl.tensor, ON_CARD: tl.constexpr) -> tl.tensor:
    """-log(-log(1 - u)) with the very functions that torch calls; the interpreter has no log1p."""
    if ON_CARD:
        exponential = -libdevice.log1p(-u)
    else:
        # Kahan's: the error of log(rest) from rounding 1 - u is that of u / (1 - rest), so it cancels.
        rest = 1.0 - u
        exponential = tl.where(rest == 1.0, u, -tl.log(rest) * (u / tl.maximum(1.0 - rest, 1e-10)))
    return -tl.log(exponential)


@triton.jit
def _rough_gumbel(u: tl.tensor, ON_CARD: tl.constexpr) -> tl.tensor:
    """-log(-log(1 - u)) to 5e-5."""
    series = u * (1.0 + u * (0.5 + u * (0.3333333 + u * 0.25)))  # for small u: the logarithm's error is absolute
    exponential = tl.where(u < 0.015625, series, _rough_log2(1.0 - u, ON_CARD) * -0.6931471805599453)
    return _rough_log2(exponential, ON_CARD) * -0.6931471805599453


@triton.jit
def _rough_log2(x: tl.tensor, ON_CARD: tl.constexpr) -> tl.tensor:
    """One instruction on a card."""
    if ON_CARD:
        return libdevice.fast_log2f(x)
    return tl.log2(x)
