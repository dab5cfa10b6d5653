"""The sums of decodes over the cards of one host: by our own kernel, in memory that the cards write for each other.

NCCL takes 7 microseconds for 8 KB between two H200, and the norm that follows another launch; there are two sums a
layer. Memory is had from torch.distributed's symmetric memory, without NVLink multicast. Larger sums are NCCL's, and so
are all where a card cannot write into another's memory.
"""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.parallel.shard import Shard

logger = logging.getLogger(__name__)

LIMIT_VARIABLE = "DIPTYCH_SMALL_SUMS_KIB"
LIMIT_KIB = 2048
"""Most that a rank sends in one sum, to all the others together; the variable above says otherwise, and 0 is never."""
_UNIT = 16  # bytes that loads want a row to be a multiple of


def limit_bytes() -> int:
    """As the environment has it. Raises ValueError where it is no number."""
    return int(os.environ.get(LIMIT_VARIABLE, LIMIT_KIB)) * 1024


class SmallSums:
    """Sums of up to `max_rows` rows of one width and type, each with the residual sum and the norm behind it.

    Args:
        inboxes: all ranks', as this one sees them: int64 [senders, 2, capacity] zeros. See `runtime.kernels.sum_norm`.
        max_rows: at most as many as the capacity has room for.
    """

    def __init__(self, shard: Shard, inboxes: list[Tensor], hidden: int, dtype: torch.dtype, max_rows: int) -> None:
        self.of = (hidden, dtype)
        self.max_rows = max_rows
        self._shard = shard
        self._keep = inboxes
        self._capacity = inboxes[0].shape[2]
        device = inboxes[shard.rank].device
        self._addresses = torch.tensor([inbox.data_ptr() for inbox in inboxes], dtype=torch.int64).to(device)
        self._counters = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._broken = torch.zeros(1, dtype=torch.int32, device=device)
        if device.type == "cuda":
            self._one = torch.ones(1, dtype=torch.int32, pin_memory=True)
            self._beside = torch.cuda.Stream(device)
            torch.cuda.synchronize(device)

    def serves(self, x: Tensor) -> bool:
        """Whether this sum is to be made here; the same on all ranks."""
        return 0 < len(x) <= self.max_rows

    def add_norm_(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The norm of the residual [T, H] with the sum of all ranks' x [T, H] added in place, and that residual.

        Without a residual the sum becomes one.
        """
        from runtime.kernels.sum_norm import sum_add_norm_  # Triton is not needed elsewhere

        return sum_add_norm_(
            x, residual, weight, eps, rank=self._shard.rank, inboxes=self._addresses, capacity=self._capacity,
            counters=self._counters, broken=self._broken,
        )  # fmt: skip

    def abort(self) -> None:
        """Have kernels that wait for another rank come back, whatever comes out. From any thread."""
        with torch.cuda.device(self._broken.device), torch.cuda.stream(self._beside):
            self._broken.copy_(self._one, non_blocking=True)  # by a copy engine, while kernels run


def small_sums(shard: Shard, hidden: int, dtype: torch.dtype, device: torch.device) -> SmallSums | None:
    """On all ranks at once: those of a model's layers, or None where NCCL is to make them all.

    Where one rank cannot have them, none has. Every rank is a process with one card of this host.
    """
    row_bytes = hidden * dtype.itemsize
    max_rows = limit_bytes() // (row_bytes * (shard.size - 1)) if shard.size > 1 and row_bytes % _UNIT == 0 else 0
    if device.type != "cuda" or not max_rows:
        return None
    others = [card for card in range(torch.cuda.device_count()) if card != device.index]
    able = shard.size <= 1 + len(others) and all(torch.cuda.can_device_access_peer(device, card) for card in others)
    if not _all_of_them(able, device):
        logger.info("the cards cannot write into each other's memory; NCCL makes all sums")
        return None
    inboxes: list[Tensor] = []
    try:
        inboxes = _connect(shard, max_rows * row_bytes // 4, device)
    except Exception:
        logger.warning("no symmetric memory between the cards; NCCL makes all sums", exc_info=True)
    if not _all_of_them(bool(inboxes), device):
        return None
    return SmallSums(shard, inboxes, hidden, dtype, max_rows)


def _connect(shard: Shard, capacity: int, device: torch.device) -> list[Tensor]:
    import torch.distributed._symmetric_memory as symmetric_memory

    shape = (shard.size, 2, capacity)
    own = symmetric_memory.empty(shape, dtype=torch.int64, device=device)
    handle = symmetric_memory.rendezvous(own, dist.group.WORLD)  # type: ignore[arg-type]
    own.zero_()
    torch.cuda.synchronize(device)
    others = (own if rank == shard.rank else handle.get_buffer(rank, shape, torch.int64) for rank in range(shard.size))
    return list(others)


def _all_of_them(able: bool, device: torch.device) -> bool:
    """Whether all ranks are; waits until all have said so."""
    held = torch.tensor([int(able)], device=device)
    dist.all_reduce(held, dist.ReduceOp.MIN)
    return bool(held)
