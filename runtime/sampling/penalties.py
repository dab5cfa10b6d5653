"""Repetition, presence and frequency penalties, with token counts that live on the device.

The counts are brought up to date by the sampled tokens where they are, so a step can be launched before the
host has seen the last step's tokens.

Repetition: Keskar et al., "CTRL: A Conditional Transformer Language Model" (2019), over prompt and output.
Presence and frequency: the OpenAI API's, over the output alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class PenaltyTable:
    """What each slot's request has seen: [num_slots, V] output counts (int32) and prompt tokens (bool)."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.output_counts = torch.zeros(num_slots, vocab_size, dtype=torch.int32, device=device)
        self.in_prompt = torch.zeros(num_slots, vocab_size, dtype=torch.bool, device=device)

    def reset(self, slot: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Sets a slot's row for a request that has these prompt and output tokens."""
        device = self.output_counts.device
        pinned = device.type == "cuda"  # a copy from pageable memory would wait for the step in flight
        prompt_ids, output_ids = (
            torch.tensor(ids, dtype=torch.int64, pin_memory=pinned).to(device, non_blocking=True)
            for ids in (prompt, output)
        )
        self.in_prompt[slot].fill_(False).index_fill_(0, prompt_ids, True)
        ones = torch.ones(len(output), dtype=torch.int32, device=device)
        self.output_counts[slot].zero_().index_add_(0, output_ids, ones)


@dataclass(frozen=True, slots=True)
class PenaltyRows:
    """The rows of a batch that carry a penalty, P of them, and their slots in the table.

    `rows` int64 [P], or None for every row; `slots` int64 [P]; each penalty float32 [P, 1].
    """

    table: PenaltyTable
    rows: Tensor | None
    slots: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor

    def apply_(self, logits: Tensor) -> None:
        """Changes the rows' logits, float32 [R, V], in place."""
        part = logits if self.rows is None else logits.index_select(0, self.rows)
        counts = self.table.output_counts.index_select(0, self.slots)
        in_output = counts > 0
        seen = self.table.in_prompt.index_select(0, self.slots).logical_or_(in_output)
        factor = torch.where(part > 0, 1.0 / self.repetition, self.repetition)
        part = torch.where(seen, part * factor, part)
        part.sub_(self.frequency * counts).sub_(self.presence * in_output)
        if self.rows is None:
            logits.copy_(part)
        else:
            logits.index_copy_(0, self.rows, part)

    def record(self, token_ids: Tensor) -> None:
        """Counts the batch's sampled tokens, int64 [R], as output."""
        tokens = token_ids if self.rows is None else token_ids.index_select(0, self.rows)
        flat = self.slots * self.table.vocab_size + tokens
        ones = torch.ones_like(flat, dtype=torch.int32)
        self.table.output_counts.view(-1).scatter_add_(0, flat, ones)
