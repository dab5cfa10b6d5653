"""What a profile runs: rounds of requests that take the runtime through every kind of step.

A round is submitted when the one before has ended, or nearly, so that the device is never idle for long: its clocks
are those of a server that works. The rounds are drawn from a seeded design without an end; any beginning of it has some
of each kind.

    drain     outputs end one after another: decode batches of every size, at many contexts
    edge      a batch as large as a captured graph, or larger by one
    skew      one long context among short ones
    prompt    prompts alone, as long as a captured step, one token longer or shorter; or longer than the token budget
    mixed     a few prompts that arrive together, the first of which decode while the last ones wait for their turn
    beside    a batch that decodes for a while, and prompts that arrive meanwhile, alone or a few together: so many that
              the step is as large as a captured one, or a token larger or smaller; or of any length
    lookup    for an engine that caches prefixes, in a design of their own: a few prompts of any lengths together, new
              to the cache, and then as many that begin alike
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from policies.replica_state import Limits

EDGE_STEPS = 6
"""Decode steps of a batch of one size."""
PER_CYCLE = 4
"""Sizes of batches, and of prompts, for one round of each other kind."""
BESIDE, ARRIVALS, TOGETHER = 2, 12, 6
"""Batches that prompts arrive beside, in a cycle; how often they arrive; how many at once, at most."""


@dataclass(frozen=True, slots=True)
class Round:
    """Requests that are submitted together, as (prompt tokens, output tokens).

    `overlap`: how many of them may still run when the next round comes. `texts`: a number for each prompt; those with
    the same one begin alike. None: all do.
    """

    kind: str
    requests: tuple[tuple[int, int], ...]
    overlap: int = 0
    texts: tuple[int, ...] = ()


class Design:
    """Draws rounds within limits; sizes are log-uniform."""

    def __init__(self, limits: Limits, seed: int) -> None:
        self._limits = limits
        self._random = np.random.default_rng(seed)
        self._tokens = limits.num_blocks * limits.block_size
        self._longest = max(1, min(limits.max_model_len - 1, self._tokens // 2))

    def rounds(self) -> Iterator[Round]:
        """Without an end."""
        edges, prompts = self._endless(self._edge_sizes()), self._endless(self._prompt_sizes())
        batches, totals = self._endless(self._batches()), self._endless(self._prompt_sizes())
        while True:
            yield self._drain()
            for _ in range(PER_CYCLE):
                yield self._edge(next(edges))
                yield Round("prompt", ((next(prompts), 1),))
            for i in range(BESIDE):
                yield from self._beside(next(batches), totals, long=i % 2 == 0)
            yield self._mixed()
            yield self._skew()

    def lookups(self) -> Iterator[Round]:
        """Without an end."""
        text = 0
        while True:
            count = int(self._random.integers(1, TOGETHER + 1))
            texts = tuple(range(text, text + count))
            for _ in range(2):
                sizes = self._random.integers(1, self._longest + 1, size=count).tolist()
                yield Round("lookup", tuple((size, 1) for size in sizes), overlap=1, texts=texts)
            text += count

    def _size(self, largest: float) -> int:
        return int(np.exp(self._random.uniform(0, np.log(max(1.0, largest)))))

    def _endless(self, sizes: Sequence[int]) -> Iterator[int]:
        while True:
            yield from self._random.permutation(sizes).tolist()

    def _edge_sizes(self) -> list[int]:
        most = self._limits.max_num_seqs
        sizes = self._limits.capture_sizes or tuple(2**k for k in range(most.bit_length()))
        return sorted({size + more for size in sizes for more in (0, 1) if size + more <= most})

    def _prompt_sizes(self) -> list[int]:
        """Around what is captured; and as many again between that and the longest prompt, past the token budget too."""
        captured = self._limits.mixed_capture_sizes
        around = [size + more for size in captured for more in (-1, 0, 1)]
        low, count = max((size for size in captured if size < self._longest), default=1), max(8, len(captured))
        beyond = np.exp(np.linspace(np.log(low), np.log(self._longest), count)).astype(int).tolist()
        return sorted({size for size in (*around, *beyond) if 1 <= size <= self._longest})

    def _batches(self) -> list[int]:
        """From 1 to nearly as many as can run, each 2.5 times the one before."""
        most = max(1, self._limits.max_num_seqs - TOGETHER)
        return sorted({min(most, round(2.5**k)) for k in range(10)})

    def _room(self, batch: int) -> int:
        """The longest sequence that each of a batch can have."""
        return max(1, min(self._longest, self._tokens // (2 * batch)))

    def _drain(self) -> Round:
        batch = min(self._size(self._limits.max_num_seqs * 1.5), self._limits.max_num_seqs)
        half = max(1, self._room(batch) // 2)
        steps = max(1, min(half, 2 * batch))
        sizes = tuple((self._size(half), max(1, (i + 1) * steps // batch)) for i in range(batch))
        return Round("drain", sizes, overlap=1)

    def _edge(self, batch: int) -> Round:
        context = self._size(min(512, max(1, self._room(batch) - EDGE_STEPS)))
        output = min(1 + EDGE_STEPS, self._room(batch))
        return Round("edge", ((context, output),) * batch)

    def _skew(self) -> Round:
        batch = max(2, self._size(self._limits.max_num_seqs / 4))
        batch = min(batch, self._limits.max_num_seqs)
        long = max(1, min(self._longest // 2, self._tokens // 4))
        short = self._size(max(1, self._room(batch) // 8))
        output = min(8, self._room(batch))
        return Round("skew", ((long, output), *((short, output),) * (batch - 1)))

    def _beside(self, batch: int, totals: Iterator[int], *, long: bool) -> Iterator[Round]:
        half = max(1, self._room(batch) // 2)
        output = min(half, 4 * ARRIVALS)  # a prompt takes a few steps
        contexts = [int(self._random.uniform(half / 2, half)) if long else self._size(half) for _ in range(batch)]
        yield Round("beside", tuple((max(1, context), output) for context in contexts), overlap=batch)
        for i in range(ARRIVALS):
            # Every other time the step is as large as one that was captured, at least while the batch lasts.
            tokens = max(1, next(totals) - batch) if i % 2 else self._size(self._longest)
            parts = self._split(tokens, self._size(TOGETHER))
            yield Round("beside", tuple((part, 1) for part in parts), overlap=batch)

    def _split(self, tokens: int, parts: int) -> list[int]:
        """Into parts of random sizes, none of them empty."""
        cuts = sorted({0, tokens, *self._random.integers(1, max(2, tokens), size=parts - 1).tolist()})
        return [after - before for before, after in itertools.pairwise(cuts)]

    def _mixed(self) -> Round:
        batch = min(self._size(self._limits.max_num_seqs), 8)
        share = max(2, min(self._longest // 2, 2 * self._limits.max_num_batched_tokens // batch))
        return Round("mixed", tuple((self._size(share), 2 + self._size(min(24, share))) for _ in range(batch)))
