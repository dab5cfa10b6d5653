"""Two attention backends as one: decodes go to the one, chunks to the other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from runtime.attention.base import AttentionBackend
from runtime.forward import ForwardInputs
from runtime.kv_cache import PagedKVCache


@dataclass(slots=True)
class _Plan:
    """Rows before `first_row` are the decodes'. A part that the step does not have has no plan."""

    first_row: int
    decodes: object | None
    chunks: object | None


class SplitBackend:
    """Attention by `decode` for decodes and by `prefill` for chunks; a mixed step is cut between the two."""

    def __init__(self, prefill: AttentionBackend, decode: AttentionBackend) -> None:
        self.name = f"prefill={prefill.name},decode={decode.name}"
        self.capturable = decode.capturable
        self.captures_chunks = False  # the cut is where the decodes end, and that is on the host
        self._prefill = prefill
        self._decode = decode

    def prepare(self, inputs: ForwardInputs, kv_cache: PagedKVCache) -> _Plan:
        """Give each backend its part of the step, and the whole of it where there is one part alone."""
        cut = inputs.num_decodes
        if cut == 0:
            return _Plan(cut, None, self._prefill.prepare(inputs, kv_cache))
        if cut == len(inputs.seq_lens):
            return _Plan(cut, self._decode.prepare(inputs, kv_cache), None)
        decodes, chunks = _cut(inputs)
        return _Plan(cut, self._decode.prepare(decodes, kv_cache), self._prefill.prepare(chunks, kv_cache))

    def attend(self, query: Tensor, layer: int, kv_cache: PagedKVCache, plan: object) -> Tensor:
        """query [T, num_heads, head_dim], contiguous -> the same shape."""
        assert isinstance(plan, _Plan)
        if plan.chunks is None:
            return self._decode.attend(query, layer, kv_cache, plan.decodes)
        if plan.decodes is None:
            return self._prefill.attend(query, layer, kv_cache, plan.chunks)
        cut = plan.first_row
        decodes = self._decode.attend(query[:cut], layer, kv_cache, plan.decodes)
        return torch.cat([decodes, self._prefill.attend(query[cut:], layer, kv_cache, plan.chunks)])


def _cut(inputs: ForwardInputs) -> tuple[ForwardInputs, ForwardInputs]:
    """A mixed step's decodes and its chunks, each as a step of its own."""
    cut = inputs.num_decodes
    assert inputs.host_query_lens is not None, "mixed steps are not captured"
    assert inputs.host_seq_lens is not None
    decodes = replace(
        inputs,
        input_ids=inputs.input_ids[:cut],
        positions=inputs.positions[:cut],
        slot_mapping=inputs.slot_mapping[:cut],
        query_start_loc=inputs.query_start_loc[: cut + 1],
        seq_lens=inputs.seq_lens[:cut],
        block_table=inputs.block_table[:cut],
        host_query_lens=inputs.host_query_lens[:cut],
        host_seq_lens=inputs.host_seq_lens[:cut],
    )
    chunks = replace(
        inputs,
        input_ids=inputs.input_ids[cut:],
        positions=inputs.positions[cut:],
        slot_mapping=inputs.slot_mapping[cut:],
        query_start_loc=inputs.query_start_loc[cut:] - cut,
        seq_lens=inputs.seq_lens[cut:],
        block_table=inputs.block_table[cut:],
        host_query_lens=inputs.host_query_lens[cut:],
        host_seq_lens=inputs.host_seq_lens[cut:],
        num_decodes=0,
    )
    return decodes, chunks
