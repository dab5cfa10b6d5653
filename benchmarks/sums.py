"""The sums over the ranks of a decode step, by themselves: `benchmarks.tensor_parallel` runs this as one of its parts.

Each is measured 40 times over in one CUDA graph, with the residual sum and the norm that follow it in a layer:
nccl    all_reduce, then the norm's kernel
torch   `one_shot_all_reduce` of PyTorch's symmetric memory, then the norm's kernel
ours    `runtime.parallel.exchange`: all of it in one kernel
Before that ours is compared with the first, on random numbers and with ranks that are late.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.kernels.norm import add_rms_norm_
from runtime.parallel import ranks as parallel
from runtime.parallel.exchange import LIMIT_VARIABLE, Exchange
from runtime.parallel.ranks import Ranks
from runtime.parallel.shard import Shard

HIDDEN = 4096
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
LARGE = (1024, 2048, 4096)
COUNT = 40
EPS = 1e-5
Say = Callable[[dict[str, Any]], None]


def measure(size: int) -> Iterator[dict[str, Any]]:
    """What is known so far, again and again: microseconds by way and message size."""
    with tempfile.TemporaryDirectory() as folder:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe(duplex=False)
        store = Path(folder) / "store"
        processes = [spawn.Process(target=_run, args=(rank, size, store, theirs)) for rank in range(size)]
        for one in processes:
            one.start()
        theirs.close()
        try:
            while True:
                yield ours.recv()
        except EOFError:
            pass
        for one in processes:
            one.join()


def _run(rank: int, size: int, store: Path, result: Connection) -> None:
    device = torch.device("cuda", rank)
    parallel.join(rank, size, device, store)
    os.environ[LIMIT_VARIABLE] = str(ROWS[-1] * HIDDEN * 2 * (size - 1) // 1024)
    found: dict[str, Any] = {"rows_of": HIDDEN, "us": {}}

    def say(part: dict[str, Any]) -> None:
        found["us"] |= part
        if rank == 0:
            result.send(found)

    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream), torch.inference_mode():
        ranks, bare = Ranks(Shard(rank, size)), Ranks(Shard(rank, size))
        weight = torch.ones(HIDDEN, dtype=torch.bfloat16, device=device)
        ways: dict[str, Callable[[Tensor, Tensor], object]] = {
            "nccl": lambda x, residual: bare.all_reduce(x),
            "nccl and norm": lambda x, residual: add_rms_norm_(bare.all_reduce(x), residual, weight, EPS),
        }
        for name, way in ways.items():
            say({name: _times(way, (*ROWS, *LARGE), device, stream)})
        ranks.prepare(HIDDEN, torch.bfloat16, device)
        ours = ranks._exchange
        if ours is None:
            say({"ours": "no symmetric memory between these cards"})
        else:
            found["equal_on_all_ranks"], found["largest_error"] = _compare(bare, ours, weight, device)
            say({"ours": _times(lambda x, r: ours.add_norm_(x, r, weight, EPS), ROWS, device, stream)})
            say({"torch and norm": _torch_ways(weight, device, stream)})
    stream.synchronize()
    ranks.close()
    parallel.leave()
    os._exit(0)


def _times(
    way: Callable[[Tensor, Tensor], object],
    rows: tuple[int, ...],
    device: torch.device,
    stream: torch.cuda.Stream,
    make: Callable[[int], Tensor] | None = None,
) -> dict[str, float]:
    """KiB -> microseconds."""
    found = {}
    for count in rows:
        shape = (count, HIDDEN)
        x = make(count) if make else torch.zeros(shape, dtype=torch.bfloat16, device=device)
        residual = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        way(x, residual)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(COUNT):
                way(x, residual)
        times = []
        for _ in range(20):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            times.append(1e3 * began.elapsed_time(ended) / COUNT)
        found[str(x.nbytes // 1024)] = round(median(times), 2)
        del graph
    return found


def _torch_ways(weight: Tensor, device: torch.device, stream: torch.cuda.Stream) -> dict[str, float] | str:
    import torch.distributed._symmetric_memory as symmetric_memory

    whole = symmetric_memory.empty((ROWS[-1], HIDDEN), dtype=torch.bfloat16, device=device)
    symmetric_memory.rendezvous(whole, dist.group.WORLD)  # type: ignore[arg-type]
    whole.zero_()
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    one_shot = torch.ops.symm_mem.one_shot_all_reduce

    def way(x: Tensor, residual: Tensor) -> Tensor:
        return add_rms_norm_(one_shot(x, "sum", name), residual, weight, EPS)

    return _times(way, ROWS[:-1], device, stream, lambda count: whole[:count])


def _compare(bare: Ranks, ours: Exchange, weight: Tensor, device: torch.device) -> tuple[bool, float]:
    """200 sums of random sizes, the ranks now and then a millisecond late: whether all ranks have the same bits, and
    the largest relative error beside float32."""
    draw = random.Random(0)  # the same on all ranks
    torch.manual_seed(bare.shard.rank)
    equal, worst = True, 0.0
    for _ in range(200):
        shape = (draw.choice(ROWS), HIDDEN)
        late = draw.randrange(2 * bare.size)
        x = torch.randn(shape, device=device).bfloat16()
        residual = bare.broadcast(torch.randn(shape, device=device).bfloat16())
        total = bare.all_reduce(x.float()) + residual.float()
        if late == bare.shard.rank:
            torch.cuda._sleep(2_000_000)
        normed, stored = ours.add_norm_(x, residual, weight, EPS)
        worst = max(worst, float((stored.float() - total).norm() / total.norm()))
        wanted = torch.nn.functional.rms_norm(stored.float(), (HIDDEN,), weight.float(), EPS)
        worst = max(worst, float((normed.float() - wanted).norm() / wanted.norm()))
        for mine in (stored, normed):
            equal &= all(torch.equal(mine, other) for other in bare.all_gather(mine))
    return equal, round(worst, 6)
