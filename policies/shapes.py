"""The shape of a step: what its cost depends on, padding included. Pure functions, used by both panels."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class StepShape(NamedTuple):
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
    chunk_squares: int = 0  # of the chunks' sizes, summed
    num_samples: int = 0  # rows that go through the LM head
    padded_tokens: int = 0
    graph: bool = False  # run from a captured graph
    swapped_out: int = 0  # KV copied to host memory before it, in tokens: whole blocks
    swapped_in: int = 0  # the same, from host memory
    num_named: int = 0  # with prefix caching, requests that came since the step before
    named_blocks: int = 0  # the full blocks of their prompts, which are named then
    looked_up_blocks: int = 0  # those of who is admitted: looked up, and hit or entered in the prefix index

    @property
    def looks_up(self) -> bool:
        """Whether prompts are named or looked up for it."""
        return bool(self.num_named or self.looked_up_blocks)

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.chunk_tokens


def growing(
    num_decodes: int, context: int, longest: int, start: int, tokens: int, padded: int, graph: bool
) -> Iterator[StepShape]:
    """Shapes of steps in a row: the decodes' contexts grow by a token each, and a chunk of so many `tokens` (0: none)
    goes on where the one before it ended. `context`, `longest` and `start` are those of the first."""
    fill, chunks, pairs, squares = tuple.__new__, int(tokens > 0), (tokens * tokens + tokens) // 2, tokens * tokens
    while True:
        end = start + tokens
        # Not by the constructor, which takes three times as long.
        most, paired = longest if longest > end else end, tokens * start + pairs
        yield fill(
            StepShape,
            (
                num_decodes, context, most, chunks, tokens, paired, end, squares, num_decodes, padded, graph,
                0, 0, 0, 0, 0,
            ),
        )  # fmt: skip
        context += num_decodes
        longest += 1
        start = end


def default_capture_sizes(largest: int) -> tuple[int, ...]:
    """Batch sizes worth capturing: 1, 2, 4, every 8 to 256, every 16 (vLLM's ladder), and `largest` itself."""
    sizes = {1, 2, 4, *range(8, 257, 8), *range(272, largest + 1, 16), largest}
    return tuple(sorted(size for size in sizes if 0 < size <= largest))


MAX_CAPTURED_CHUNKS = 64
"""Steps with more chunks than this run uncaptured: a captured one sets aside room for so many."""
MAX_CAPTURED_TOKENS = 2048
"""Beyond, a step keeps a card busy for longer than it takes to launch it."""


def default_mixed_capture_sizes(largest: int) -> tuple[int, ...]:
    """Token counts of steps with chunks worth capturing: every 64 to 256, every 128 to 1024, every 256 to 2048.

    Up to `largest` tokens a step, which is one of them where it is not above 2048.
    """
    largest = min(largest, MAX_CAPTURED_TOKENS)
    sizes = {*range(64, 257, 64), *range(384, 1025, 128), *range(1280, MAX_CAPTURED_TOKENS + 1, 256), largest}
    return tuple(sorted(size for size in sizes if 0 < size <= largest))


def padded_batch(
    num_decodes: int, num_chunks: int, chunk_tokens: int, sizes: Sequence[int], mixed_sizes: Sequence[int] = ()
) -> tuple[int, bool]:
    """Tokens that are really computed, and whether a captured graph runs them.

    A step of decodes alone is padded to the next of `sizes`, one with chunks to the next of `mixed_sizes`. What is
    larger, or has too many chunks, runs as it is. Both ascend; an empty one means that nothing is captured.
    """
    tokens = num_decodes + chunk_tokens
    ladder = mixed_sizes if num_chunks else sizes
    if not tokens or not ladder or tokens > ladder[-1] or num_chunks > MAX_CAPTURED_CHUNKS:
        return tokens, False
    return ladder[bisect_left(ladder, tokens)], True
