"""What one forward pass of the model is given: a ragged batch of prefill chunks and decodes, flattened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class ForwardInputs:
    """One step's inputs: T tokens of S sequences, the tokens of a sequence side by side and in order.

    A prefill chunk and a decode differ only in how many tokens they have. Rows beyond `query_start_loc[S]`
    and sequences with `seq_lens == 0` are padding: their slot is -1, nothing is written for them, and what
    comes out at their rows means nothing.

    A step that is captured in a CUDA graph has no lengths on the host: kernels find them on the device, whatever they
    are when the graph runs. If it has chunks, it has `decode_count` too.

    Shapes and types (device tensors unless said otherwise):
        input_ids        [T] int64
        positions        [T] int64, position of each token in its sequence; 0 in padded rows
        slot_mapping     [T] int64, where K and V go: block_id * block_size + offset; -1 writes nothing
        query_start_loc  [S + 1] int32, sequence s has rows query_start_loc[s] : query_start_loc[s + 1]
        seq_lens         [S] int32, KV length of each sequence with this step's tokens included
        block_table      [S, max_blocks] int32, each sequence's block ids; what follows its last is ignored
        host_query_lens, host_seq_lens
                         the lengths again, on the host, S entries each; None in a captured step
        num_decodes      the first so many sequences have one token each, and sequence i of them has row i; in a
                         captured step with chunks at most so many
        decode_count     [1] int32, how many they really are there; None in other steps
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    host_query_lens: Sequence[int] | None
    host_seq_lens: Sequence[int] | None
    num_decodes: int = 0
    decode_count: Tensor | None = None
