"""What the ranks of a model say to each other on their devices: sums, gathers and broadcasts, in the order of steps."""

from __future__ import annotations

import datetime
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.parallel import torchrun
from runtime.parallel.exchange import Exchange, connect
from runtime.parallel.shard import Shard

if TYPE_CHECKING:
    from runtime.ops import Ops

logger = logging.getLogger(__name__)

TIMEOUT_S = 300.0
"""For ranks to find each other, and for one to wait for another where nobody has noticed that it hangs."""


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in PyTorch 2.13


class Ranks:
    """The ranks of one model, as one of them sees them. By default there is only one, and nothing is said.

    Everything here is called by every rank, in the same order; on a card it is queued, and may be captured in a graph.
    """

    def __init__(self, shard: Shard = Shard()) -> None:  # noqa: B008 (frozen)
        self.shard = shard
        self._exchange: Exchange | None = None

    @property
    def size(self) -> int:
        return self.shard.size

    def check(self) -> None:
        """Raise where another rank has failed, as rank 0 can tell."""

    def explain(self, error: BaseException) -> BaseException:
        """What is to be raised for an error on this rank."""
        return error

    def waiting(self, computed: Callable[[], float] | None) -> AbstractContextManager[None]:
        """While the result of a step is waited for; see `runtime.parallel.leader`."""
        return nullcontext()

    def close(self) -> None:
        """End the other ranks, where they are this one's."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in x itself."""
        if self.shard.size > 1:
            dist.all_reduce(x)
        return x

    def add_norm_(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, ops: Ops
    ) -> tuple[Tensor, Tensor]:
        """The RMS norm of the residual [T, H] with the sum of all ranks' x [T, H] added in place, and that residual.

        Without a residual the sum becomes one. x may be overwritten.
        """
        if self._exchange is not None and self._exchange.serves(x):
            return self._exchange.add_norm_(x, residual, weight, eps)
        x = self.all_reduce(x)
        if residual is None:
            return ops.rms_norm(x, weight, eps), x
        return ops.add_rms_norm_(x, residual, weight, eps), residual

    def merge_draws(self, scores: Tensor, tokens: Tensor, start: int, vocab_size: int, out: Tensor) -> bool:
        """Fill `out` as `runtime.kernels.exchange.merge_draws` does, if that can be done here."""
        return self._exchange is not None and self._exchange.merge_draws(scores, tokens, start, vocab_size, out)

    def prepare(self, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make ready for a model of this width and type: called by all ranks before the first step."""
        if self._exchange is None or self._exchange.of != (hidden, dtype):
            self._exchange = connect(self.shard, hidden, dtype, device) if self.shard.size > 1 else None

    def abort(self) -> None:
        """Have what waits for another rank on this one's card come back, whatever is in its memory. From any thread."""
        if self._exchange is not None:
            self._exchange.abort()
        abort()

    def all_gather(self, x: Tensor) -> Tensor:
        """[N, ...] of each rank -> [size, N, ...], the same on all."""
        if self.shard.size == 1:
            return x[None]
        gathered = x.new_empty(self.shard.size, *x.shape)
        _all_gather(gathered.flatten(0, 1), x.contiguous())
        return gathered

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x, in x itself."""
        if self.shard.size > 1:
            dist.broadcast(x, src=0)
        return x

    def smallest(self, value: int, device: torch.device) -> int:
        """The smallest of the ranks' values. Waits for the device."""
        if self.shard.size == 1:
            return value
        held = torch.tensor([value], device=device)
        dist.all_reduce(held, dist.ReduceOp.MIN)
        return int(held)


def thread_clock() -> Callable[[], float]:
    """Seconds that the calling thread has computed, to be asked for on any thread as long as it lives."""
    if hasattr(time, "pthread_getcpuclockid"):
        clock = time.pthread_getcpuclockid(threading.get_ident())
        return lambda: time.clock_gettime(clock)
    return time.process_time  # of all threads, where there is no clock of each


def join(rank: int, size: int, device: torch.device, meeting_place: Path | dist.Store) -> None:
    """Find the other ranks by a file on this host, or by a store for several: NCCL between cards, gloo elsewhere."""
    options: dict[str, Any] = {}
    job = torchrun.job()
    if device.type == "cuda":
        # NVLink SHARP's multicast objects belong to a whole host: a process that dies with them may leave its cards,
        # and other people's, unusable. Decodes' sums are small, and gain little by them.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        torch.cuda.set_device(device)
        options["device_id"] = device
    elif (job is None or job.one_host) and os.path.exists("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(str(meeting_place), size) if isinstance(meeting_place, Path) else meeting_place,
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
        **options,
    )


def leave() -> None:
    """Leave the other ranks; nothing may be on its way."""
    if dist.is_initialized():
        dist.destroy_process_group()


def abort() -> None:
    """Break off what NCCL waits for."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        try:
            dist.distributed_c10d._abort_process_group()
        except Exception:
            logger.exception("the exchange between the cards cannot be broken off")
