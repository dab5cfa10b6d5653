"""Exchanges of a few rows between the cards of one host, by kernels of ours in memory that the cards write for each
other: the sums of decodes, and which token is drawn.

NCCL takes 7 microseconds for 8 KB between two H200, and the norm that follows another launch; there are two sums a
layer. Memory is had from torch.distributed's symmetric memory, without NVLink multicast. Larger sums are NCCL's, and so
are all where a card cannot write into another's memory.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.parallel import torchrun
from runtime.parallel.shard import Shard

if TYPE_CHECKING:
    from runtime.kernels.exchange import Mail

logger = logging.getLogger(__name__)

LIMIT_VARIABLE = "DIPTYCH_SMALL_SUMS_KIB"
LIMIT_KIB = 2048
"""Most that a rank sends in one sum, to all the others together; the variable above says otherwise, and 0 is never."""
MAX_DRAWS = 1024
"""Rows that tokens are drawn for, at most."""
_UNIT = 16  # bytes that loads want a row to be a multiple of
_used = 0
"""How often this process has connected. PyTorch pairs processes by that number, whatever group they are in."""


def limit_bytes() -> int:
    """As the environment has it. Raises ValueError where it is no number."""
    return int(os.environ.get(LIMIT_VARIABLE, LIMIT_KIB)) * 1024


class Exchange:
    """Sums of up to `max_rows` rows of one width and type, and draws of up to `MAX_DRAWS`.

    Args:
        inboxes: all ranks', as this one sees them: zeros, int64 [senders, 2, words of the sums + 2 * MAX_DRAWS].
    """

    def __init__(self, shard: Shard, inboxes: list[Tensor], hidden: int, dtype: torch.dtype, max_rows: int) -> None:
        from runtime.kernels.exchange import Mail  # Triton is not needed elsewhere

        self.of = (hidden, dtype)
        self.max_rows = max_rows
        self._keep = inboxes
        device = inboxes[shard.rank].device
        addresses = torch.tensor([inbox.data_ptr() for inbox in inboxes], dtype=torch.int64)
        counters = torch.zeros(max_rows + MAX_DRAWS, dtype=torch.int32, device=device)
        self._broken = torch.zeros(1, dtype=torch.int32, device=device)

        def mail(words: int, first_row: int) -> Mail:
            places, capacity = (addresses + 8 * words).to(device), inboxes[0].shape[2]
            return Mail(shard.rank, places, capacity, counters[first_row:], self._broken)

        self._sums = mail(0, 0)
        self._draws = mail(inboxes[0].shape[2] - 2 * MAX_DRAWS, max_rows)
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
        from runtime.kernels.exchange import sum_add_norm_

        return sum_add_norm_(x, residual, weight, eps, self._sums)

    def merge_draws(self, scores: Tensor, tokens: Tensor, start: int, vocab_size: int, out: Tensor) -> bool:
        """Fill `out` as `runtime.kernels.exchange.merge_draws` does; False where there are too many rows."""
        from runtime.kernels.exchange import merge_draws

        if len(scores) > MAX_DRAWS:
            return False
        merge_draws(scores, tokens, start, vocab_size, out, self._draws)
        return True

    def abort(self) -> None:
        """Have kernels that wait for another rank come back, whatever comes out. From any thread."""
        with torch.cuda.device(self._broken.device), torch.cuda.stream(self._beside):
            self._broken.copy_(self._one, non_blocking=True)  # by a copy engine, while kernels run


def connect(shard: Shard, hidden: int, dtype: torch.dtype, device: torch.device) -> Exchange | None:
    """On all ranks at once: that of a model's layers, or None where NCCL is to do it all.

    Where one rank cannot have it, none has. Every rank is a process with one card of this host.
    """
    row_bytes = hidden * dtype.itemsize
    max_rows = limit_bytes() // (row_bytes * (shard.size - 1)) if shard.size > 1 and row_bytes % _UNIT == 0 else 0
    if device.type != "cuda" or not max_rows:
        return None
    job = torchrun.job()
    if job is not None and not job.one_host:
        return None
    others = [card for card in range(torch.cuda.device_count()) if card != device.index]
    able = shard.size <= 1 + len(others) and all(torch.cuda.can_device_access_peer(device, card) for card in others)
    if not _all_of_them(able, device):
        logger.info("the cards cannot write into each other's memory; NCCL makes all sums")
        return None
    global _used
    if _smallest(_used, device) != -_smallest(-_used, device):
        logger.warning("a process has led other ranks before, and PyTorch pairs it with none; NCCL makes all sums")
        return None
    inboxes: list[Tensor] = []
    _used += 1
    try:
        inboxes = _symmetric((shard.size, 2, max_rows * row_bytes // 4 + 2 * MAX_DRAWS), shard, device)
    except Exception:
        logger.warning("no symmetric memory between the cards; NCCL makes all sums", exc_info=True)
    if not _all_of_them(bool(inboxes), device):
        return None
    return Exchange(shard, inboxes, hidden, dtype, max_rows)


def _symmetric(shape: tuple[int, ...], shard: Shard, device: torch.device) -> list[Tensor]:
    """int64 zeros on every rank's card, as this one sees them."""
    import torch.distributed._symmetric_memory as symmetric_memory

    os.environ.setdefault("TORCH_SYMMMEM_IMPLICIT_POOL", "0")  # an allocation of its own: peers see where it begins
    own = symmetric_memory.empty(shape, dtype=torch.int64, device=device)
    handle = symmetric_memory.rendezvous(own, dist.group.WORLD)  # type: ignore[arg-type]
    own.zero_()
    torch.cuda.synchronize(device)
    others = (own if rank == shard.rank else handle.get_buffer(rank, shape, torch.int64) for rank in range(shard.size))
    return list(others)


def _all_of_them(able: bool, device: torch.device) -> bool:
    """Whether all ranks are; waits until all have said so."""
    return bool(_smallest(int(able), device))


def _smallest(value: int, device: torch.device) -> int:
    held = torch.tensor([value], device=device)
    dist.all_reduce(held, dist.ReduceOp.MIN)
    return int(held)
