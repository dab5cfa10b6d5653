"""The host memory tier: where the KV blocks of swapped requests lie, and the copies to it and back.

A host block is one KV block of all layers, [num_layers, 2, block_size, num_kv_heads, head_dim], in one piece. In the
device's cache the same block is 2 * num_layers pieces far apart. So a kernel packs some blocks into one buffer on the
device, and a single copy takes them over the link, as fast as that goes; on the way back the other way round.

Copies are queued where the steps are, between two of them, so that they come after all that was computed before and
before all that is computed later; a block may then be given out again as soon as its copy is asked for. Captured graphs
know nothing of them. On a CPU the runner's thread does the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from runtime.kv_cache import PagedKVCache
from runtime.model_config import ModelError

GIB = 1 << 30
_BUFFER_BYTES = 64 << 20
"""How much is packed at once: copies of this size reach the link's full rate."""


class Copy(Protocol):
    """Which blocks go where, one to one: out from the device to the host, or in (`policies.plan.BlockCopy`)."""

    @property
    def out(self) -> bool: ...

    @property
    def device(self) -> tuple[int, ...]: ...

    @property
    def host(self) -> tuple[int, ...]: ...


class HostMemory:
    """`num_blocks` blocks beside a cache, in pinned memory where that is on a card.

    Raises ModelError where the host does not have so much memory.
    """

    def __init__(self, cache: PagedKVCache, num_blocks: int) -> None:
        self._device = cache.device
        # A block's part of a layer is in one piece, and is moved in the widest words that it divides into.
        pieces = cache.blocks.flatten(3).flatten(0, 1)
        bytes_per_piece = pieces.shape[-1] * pieces.element_size()
        word = next(t for t in (torch.int64, torch.int32, torch.int16, torch.uint8) if not bytes_per_piece % t.itemsize)
        self._pieces = pieces.view(word)  # [2 * num_layers, blocks, words]
        count, _, words = self._pieces.shape
        block_bytes = count * bytes_per_piece
        self._most = max(1, _BUFFER_BYTES // block_bytes)
        self._packed = torch.empty(min(self._most, num_blocks), count, words, dtype=word, device=self._device)
        self._pinned = self._device.type == "cuda"
        try:
            self._host = torch.empty(num_blocks, count, words, dtype=word)
            if self._pinned:
                # Not by PyTorch's own pinned allocator, which takes the next power of two.
                size = self._host.numel() * self._host.element_size()
                torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(self._host.data_ptr(), size, 0)))
        except RuntimeError as error:
            raise ModelError(
                f"{num_blocks} blocks of host memory need {num_blocks * block_bytes / GIB:,.1f} GiB, which cannot be "
                f"had ({str(error).strip().partition(chr(10))[0]}); lower limits.num_host_blocks or --host-memory"
            ) from error
        if self._pinned:  # compiled now, and not in somebody's first swap; the cache holds nothing yet
            ids = torch.zeros(1, dtype=torch.int32, device=self._device)
            self._move(ids, self._packed[:1], gather=True)
            self._move(ids, self._packed[:1], gather=False)

    def close(self) -> None:
        """Give the memory back. Nothing may be on its way."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._host.data_ptr())
            self._pinned = False
        del self._host

    def make(self, copies: Sequence[Copy]) -> None:
        """Make these copies in their order: on a card, queue them on the current stream."""
        for copy in copies:
            for start in range(0, len(copy.device), self._most):
                device, host = (blocks[start : start + self._most] for blocks in (copy.device, copy.host))
                packed = self._packed[: len(device)]
                ids = torch.tensor(device, dtype=torch.int32)
                if self._device.type == "cuda":
                    ids = ids.pin_memory().to(self._device, non_blocking=True)
                if copy.out:
                    self._pack(ids, packed)
                for here, there in _runs(host):
                    away = self._host[there]
                    if copy.out:
                        away.copy_(packed[here], non_blocking=True)
                    else:
                        packed[here].copy_(away, non_blocking=True)
                if not copy.out:
                    self._unpack(ids, packed)

    def _pack(self, ids: Tensor, packed: Tensor) -> None:
        if self._device.type == "cuda":
            self._move(ids, packed, gather=True)
        else:
            torch.index_select(self._pieces.transpose(0, 1), 0, ids, out=packed)

    def _unpack(self, ids: Tensor, packed: Tensor) -> None:
        if self._device.type == "cuda":
            self._move(ids, packed, gather=False)
        else:
            self._pieces.transpose(0, 1).index_copy_(0, ids.long(), packed)

    def _move(self, ids: Tensor, packed: Tensor, *, gather: bool) -> None:
        from runtime.kernels.swap import move_blocks  # Triton is not needed elsewhere

        pieces = self._pieces
        grid = (len(ids), len(pieces))
        move_blocks[grid](pieces, packed, ids, pieces.stride(0), pieces.shape[2], GATHER=gather, BLOCK=1024)


def _runs(blocks: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Stretches of blocks that follow each other: (places in `blocks`, the blocks themselves)."""
    start = 0
    for i in range(1, len(blocks) + 1):
        if i == len(blocks) or blocks[i] != blocks[i - 1] + 1:
            yield slice(start, i), slice(blocks[start], blocks[i - 1] + 1)
            start = i
