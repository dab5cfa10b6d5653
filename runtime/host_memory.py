"""The host memory tier: where KV blocks of swapped requests and of cached prefixes lie, and the copies to it and back.

A host block is one KV block of all layers, [num_layers, 2, block_size, num_kv_heads, head_dim], in one piece. In the
device's cache the same block is 2 * num_layers pieces far apart. So a kernel packs some blocks into one buffer on the
device, and a single copy takes them over the link, as fast as that goes; on the way back the other way round.

Blocks are packed and unpacked where the steps are, between two of them, so that this comes after all that was computed
before and before all that is computed later; a block may then be given out again as soon as its copy is asked for. The
link works beside the steps (`runtime.copy_streams`). Captured graphs know nothing of it. On a CPU the runner's thread
makes the copies between steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from policies.plan import CopyTimes
from runtime.copy_streams import CopyStreams
from runtime.kv_cache import PagedKVCache
from runtime.model_config import ModelError

GIB = 1 << 30
_BUFFER_BYTES = 64 << 20
"""How much is packed at once: copies of this size reach the link's full rate."""
_BUFFERS = 8
"""So many times as much may be on its way beside the steps of a card."""


class Copy(Protocol):
    """Which blocks go where, one to one: out from the device to the host, or in (`policies.plan.BlockCopy`)."""

    @property
    def out(self) -> bool: ...

    @property
    def device(self) -> tuple[int, ...]: ...

    @property
    def host(self) -> tuple[int, ...]: ...


class Made(Protocol):
    """A step's copies, made or on their way."""

    def times(self) -> CopyTimes:
        """After the step's end: how long they took."""
        ...


@dataclass(frozen=True, slots=True)
class AtOnce:
    """Copies that steps have waited for."""

    out_ns: int
    in_ns: int

    def times(self) -> CopyTimes:
        return CopyTimes(self.out_ns, self.in_ns, self.out_ns + self.in_ns)


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
            self._streams = CopyStreams(self._packed, min(_BUFFERS, -(-num_blocks // self._most)))

    def close(self) -> None:
        """Give the memory back. No step may be on its way."""
        if self._pinned:
            self._streams.wait()
            del self._streams
            torch.cuda.cudart().cudaHostUnregister(self._host.data_ptr())
            self._pinned = False
        del self._host

    def block_bytes(self, host: int) -> memoryview:
        """One block's, to be read and written."""
        return self._host[host].view(torch.uint8).numpy().data.cast("B")

    def ready(self) -> Callable[[], None] | None:
        """What waits, on any thread, until the copies that have been asked for are made; None where they are made as
        they are asked for."""
        return self._streams.ready() if self._pinned else None

    def make(self, copies: Sequence[Copy]) -> Made:
        """Make these copies in their order: on a card, queue them before what comes next on the current stream."""
        return self._queue(copies) if self._pinned else self._make_at_once(copies)

    def _parts(self, copy: Copy) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(device blocks, host blocks) of each buffer."""
        for start in range(0, len(copy.device), self._most):
            yield copy.device[start : start + self._most], copy.host[start : start + self._most]

    def _make_at_once(self, copies: Sequence[Copy]) -> AtOnce:
        pieces, took = self._pieces.transpose(0, 1), {True: 0, False: 0}
        for copy in copies:
            begin = time.perf_counter_ns()
            for device, host in self._parts(copy):
                packed, ids = self._packed[: len(device)], torch.tensor(device)
                if copy.out:
                    torch.index_select(pieces, 0, ids, out=packed)
                    self._take_out(packed, host)
                else:
                    self._bring_in(packed, host)
                    pieces.index_copy_(0, ids, packed)
            took[copy.out] += time.perf_counter_ns() - begin
        return AtOnce(took[True], took[False])

    def _queue(self, copies: Sequence[Copy]) -> Made:
        streams = self._streams
        with streams.step() as copying:
            for copy in copies:
                for device, host in self._parts(copy):
                    count = len(device)
                    ids = torch.tensor(device, dtype=torch.int32).pin_memory().to(self._device, non_blocking=True)

                    def move(buffer: Tensor, ids: Tensor = ids, count: int = count, out: bool = copy.out) -> None:
                        self._move(ids, buffer[:count], gather=out)

                    def over(buffer: Tensor, host: tuple[int, ...] = host, out: bool = copy.out) -> None:
                        (self._take_out if out else self._bring_in)(buffer, host)

                    if copy.out:
                        streams.take_out(host, move, over)
                    else:
                        streams.bring_in(host, over, move, copying)
        return copying

    def _take_out(self, packed: Tensor, host: tuple[int, ...]) -> None:
        for here, there in _runs(host):
            self._host[there].copy_(packed[here], non_blocking=True)

    def _bring_in(self, packed: Tensor, host: tuple[int, ...]) -> None:
        for here, there in _runs(host):
            packed[here].copy_(self._host[there], non_blocking=True)

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
