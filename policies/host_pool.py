"""The books of the host memory tier: which of its blocks hold the KV of a swapped request, and which are free.

A block holds what one KV block on the device holds, of all layers. Nothing is shared or cached here: each held block is
one swapped request's.
"""

from __future__ import annotations

from collections.abc import Sequence


class HostPool:
    """`num_blocks` blocks of host memory; 0 where there is no tier.

    Blocks may be given out again at once: copies are made in the order of the plans that ask for them.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks; the caller has checked `num_free`. What was never torn apart comes in one run."""
        if not count:
            return []
        taken = self._free[-count:]
        del self._free[-count:]
        taken.reverse()
        return taken

    def release(self, block_ids: Sequence[int]) -> None:
        """Give blocks back."""
        self._free.extend(reversed(block_ids))

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Raise AssertionError unless every block is free or held, once. `held`: those of each swapped request."""
        everywhere = [*self._free, *(block for blocks in held for block in blocks)]
        assert sorted(everywhere) == list(range(self.num_blocks)), "host blocks are not conserved"
