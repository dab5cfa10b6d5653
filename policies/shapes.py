"""The shape of a step: what its cost depends on, padding included. Pure functions, used by both panels."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes of one step.

    `context` of a sequence is the length of its KV cache once the step's tokens are in it. A chunk of n tokens from
    position s on has n*s + n*(n+1)/2 query-context pairs.
    """

    num_decodes: int = 0
    decode_context: int = 0  # summed over the decodes
    max_context: int = 0  # longest of all sequences in the step
    num_chunks: int = 0
    chunk_tokens: int = 0
    chunk_pairs: int = 0
    chunk_context: int = 0  # summed over the chunks
    num_samples: int = 0  # rows that go through the LM head
    padded_tokens: int = 0
    graph: bool = False  # run from a captured graph

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.chunk_tokens


def default_capture_sizes(largest: int) -> tuple[int, ...]:
    """Batch sizes worth capturing: 1, 2, 4, every 8 to 256, every 16 (vLLM's ladder), and `largest` itself."""
    sizes = {1, 2, 4, *range(8, 257, 8), *range(272, largest + 1, 16), largest}
    return tuple(sorted(size for size in sizes if 0 < size <= largest))


def padded_batch(num_decodes: int, num_chunks: int, chunk_tokens: int, sizes: Sequence[int]) -> tuple[int, bool]:
    """Tokens that are really computed, and whether a captured graph runs them.

    Only steps of decodes alone are captured; they are padded to the next captured size. Larger and mixed steps run
    as they are. `sizes` ascends; an empty one means that nothing is captured.
    """
    tokens = num_decodes + chunk_tokens
    if num_chunks or not num_decodes or not sizes or num_decodes > sizes[-1]:
        return tokens, False
    return sizes[bisect_left(sizes, num_decodes)], True
