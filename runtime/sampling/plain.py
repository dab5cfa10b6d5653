"""Sampling of rows that ask for no more than a temperature, from logits that may be spread over ranks.

Noise is a function of (key, position, token id), so each rank finds the best of its own tokens, and only these and
their scores are exchanged: a few numbers a row instead of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.device_state import DeviceState
from runtime.parallel.ranks import Ranks
from runtime.parallel.shard import Layout
from runtime.sampling.noise import gumbel, row_bits, vocab_hash


class PlainSampler:
    """`fused`: with Triton kernels, as on a card. All ranks get the same tokens."""

    def __init__(self, layout: Layout, ranks: Ranks, device: torch.device, *, fused: bool) -> None:
        self._vocab, self._rows = layout.vocab, layout.vocab_rows
        self._vocab_size = layout.config.vocab_size
        self._ranks = ranks
        self._hashed = vocab_hash(self._vocab_size, device)[self._vocab.start : self._vocab.stop]
        self._fused = fused

    def __call__(self, logits: Tensor, state: DeviceState, out: Tensor) -> None:
        """Fill `out` int64 [R] with tokens for the first R rows that sample of the step that was sent.

        logits: [R, vocab_rows], of the rank's tokens.
        """
        rows = len(out)
        temperature, keys, draws = (state.part(name, rows) for name in ("temperature", "keys", "draws"))
        own = logits[:, : len(self._vocab)]
        if self._fused:
            self._by_kernels(own, temperature, keys, draws, out)
        else:
            self._by_torch(own, temperature, keys, draws, out)

    def _by_kernels(self, own: Tensor, temperature: Tensor, keys: Tensor, draws: Tensor, out: Tensor) -> None:
        from runtime.kernels.sample import merge_chunks, score_chunks  # Triton is not needed elsewhere

        # As many chunks on every rank, though the last may have fewer tokens.
        scores, tokens = score_chunks(own, temperature, keys, draws, self._hashed, width=self._rows)
        if self._ranks.size > 1:
            if self._ranks.merge_draws(scores, tokens, self._vocab.start, self._vocab_size, out):
                return
            pairs = torch.stack((scores.view(torch.int32), tokens + self._vocab.start))
            gathered = self._ranks.all_gather(pairs).permute(1, 2, 0, 3).flatten(2).contiguous()
            scores, tokens = gathered[0].view(torch.float32), gathered[1]  # [R, chunks of all ranks]
        merge_chunks(scores, tokens, self._vocab_size, out)

    def _by_torch(self, own: Tensor, temperature: Tensor, keys: Tensor, draws: Tensor, out: Tensor) -> None:
        scores = own.float()
        hot = temperature > 0
        if bool(hot.any()):
            noise = gumbel(row_bits(keys, draws.long()), self._hashed)
            drawn = scores / torch.where(hot, temperature, 1.0)[:, None] + noise
            scores = torch.where(hot[:, None], drawn, scores)
        tokens = scores.argmax(dim=-1)
        best = scores.gather(1, tokens[:, None])[:, 0]
        pairs = torch.stack((best.view(torch.int32), (tokens + self._vocab.start).int()))
        gathered = self._ranks.all_gather(pairs)  # [size, 2, R]; of equal scores the smallest token wins
        winner = gathered[:, 0].view(torch.float32).argmax(dim=0, keepdim=True)
        out.copy_(gathered[:, 1].gather(0, winner)[0])
