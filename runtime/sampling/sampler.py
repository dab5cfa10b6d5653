"""Logits to token ids for a whole batch, without the host ever waiting for the device.

Order, as in vLLM: log probabilities of the raw logits; tokens barred by min_tokens; penalties; temperature;
top-k, top-p and min-p; then argmax of the logits plus Gumbel noise, which is an exact draw from their
softmax (see `noise.py` for why). A greedy row has its noise scaled by zero and no filter, so it rides in
the same argmax.

No step reads a value back or has a shape that depends on one: what to do is decided by which fields of the
batch are None, so a run can be captured in a CUDA graph and launched before the last one's tokens are
known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.sampling.batch import LogprobRows, MinTokensMask, SamplingBatch
from runtime.sampling.filters import filter_threshold
from runtime.sampling.noise import gumbel, row_bits, vocab_hash


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log probabilities of the L rows that asked, under the model's own distribution.

    That is the softmax of the raw logits: before penalties, temperature and filters, as vLLM and the OpenAI
    API report. `row_numbers` are the rows of the batch, on the host. `sampled` float32 [L] is the sampled
    token's. `top_ids` int64 and `top` float32, [L, K], are the K most probable, most probable first; K is
    the largest number a row asked for, and each row's own is a prefix of it.
    """

    row_numbers: tuple[int, ...]
    sampled: Tensor
    top_ids: Tensor
    top: Tensor

    def to_host(self) -> Logprobs:
        """A copy in pinned memory, there once the stream has come so far."""
        return Logprobs(self.row_numbers, _to_host(self.sampled), _to_host(self.top_ids), _to_host(self.top))


def _to_host(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """`token_ids` int64 [R], on the device; `logprobs` where a row asked for them."""

    token_ids: Tensor
    logprobs: Logprobs | None


class Sampler:
    """Samples one token a row.

    Args:
        vocab_size: the width of the logits, V.
        device: where the logits are.
    """

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.hashed_vocab = vocab_hash(vocab_size, torch.device(device))

    @torch.no_grad()
    def __call__(self, logits: Tensor, batch: SamplingBatch) -> SamplerOutput:
        """Samples every row and counts the tokens for the penalties.

        Args:
            logits: float32 [R, V]; its memory is overwritten.

        Raises:
            ValueError: if the logits are not float32 [R, V].
        """
        wanted = (batch.num_rows, self.vocab_size)
        if logits.dtype != torch.float32 or tuple(logits.shape) != wanted:
            raise ValueError(f"logits must be float32 {wanted}, got {logits.dtype} {tuple(logits.shape)}")
        raw = _log_softmax(logits, batch.logprobs) if batch.logprobs is not None else None
        if batch.min_tokens is not None:
            _bar_stop_tokens_(logits, batch.min_tokens, batch.positions)
        if batch.penalties is not None:
            batch.penalties.apply_(logits)
        if batch.temperature is not None:
            logits.div_(batch.temperature)
        _filter_(logits, batch)
        if batch.any_random:
            noise = gumbel(row_bits(batch.keys, batch.positions), self.hashed_vocab)
            logits.add_(noise if batch.noise_scale is None else noise.mul_(batch.noise_scale))
        token_ids = logits.argmax(dim=-1)
        if batch.penalties is not None:
            batch.penalties.record(token_ids)
        if raw is None or batch.logprobs is None:
            return SamplerOutput(token_ids, None)
        return SamplerOutput(token_ids, _report(raw, token_ids, batch.logprobs))


def _bar_stop_tokens_(logits: Tensor, mask: MinTokensMask, positions: Tensor) -> None:
    # The position is compared here and not on the host, so that a batch can be advanced past the minimum.
    barred = positions[mask.rows] < mask.minimum
    values = logits[mask.rows, mask.tokens].masked_fill_(barred, -torch.inf)
    logits.index_put_((mask.rows, mask.tokens), values)


def _filter_(scaled: Tensor, batch: SamplingBatch) -> None:
    """Sets what top-k, top-p and min-p leave out to -inf."""
    if not batch.filters and batch.log_min_p is None:
        return
    if batch.log_min_p is not None:
        threshold = scaled.amax(dim=-1, keepdim=True).add_(batch.log_min_p)
    else:
        threshold = scaled.new_full((batch.num_rows, 1), -torch.inf)
    for group in batch.filters:
        found = filter_threshold(scaled, group)
        if group.rows is None:
            threshold = torch.maximum(threshold, found)
        else:
            merged = torch.maximum(threshold.index_select(0, group.rows), found)
            threshold.index_copy_(0, group.rows, merged)
    scaled.masked_fill_(scaled < threshold, -torch.inf)


def _log_softmax(logits: Tensor, asked: LogprobRows) -> Tensor:
    """[L, V], in memory of its own: the logits are about to be overwritten."""
    part = logits if asked.rows is None else logits.index_select(0, asked.rows)
    return part.log_softmax(dim=-1)


def _report(logprobs: Tensor, token_ids: Tensor, asked: LogprobRows) -> Logprobs:
    tokens = token_ids if asked.rows is None else token_ids.index_select(0, asked.rows)
    top = logprobs.topk(asked.top, dim=-1, sorted=True)
    sampled = logprobs.gather(1, tokens.view(-1, 1)).view(-1)
    return Logprobs(asked.row_numbers, sampled, top.indices, top.values)
