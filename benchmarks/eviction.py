"""Hit ratios of every eviction policy on a trace with prefix blocks, by size of the cache, and what a decision costs.

    python -m benchmarks.eviction --trace conversation_trace.jsonl.gz --json benchmarks/results/eviction.json

The trace is Mooncake's conversation trace where `DIPTYCH_TRACES` names the folder that has it as `mooncake/...`;
without any, a generated workload with such conversations stands in. The ratios are of blocks, hit as an unbroken
prefix.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.saving import save
from experiments.cache_study import CacheHits, study_workload
from experiments.workloads import Workload, WorkloadSpec, make_workload
from experiments.workloads.loaders import load
from policies import registry
from policies.block_pool import CachedBlock
from policies.contract import Eviction
from policies.idle_blocks import IdleBlocks

SIZES = (1_000, 3_000, 10_000, 30_000, None)
MORE = ("lfu,remember=true", "gdsf,remember=true", "gdsf,crossover=30000")
"""Knobs worth rows of their own."""
EARLIER = {
    "lru": (0.0445, 0.0653, 0.212, 0.326),
    "fifo": (0.0445, 0.0636, 0.182, 0.294),
    "lfu": (0.0774, 0.116, 0.187, 0.280),
    "gdsf": (0.0542, 0.0970, 0.232, 0.328),
    "belady": (0.179, 0.292, 0.366, 0.366),
}
"""The same trace through a cache written for nothing else, at the first four sizes. Its FIFO evicts anywhere in a chain
(the row "fifo anywhere"), its LFU and GDSF remember counts for ever (the rows with `remember`)."""
IDLE = (1_000, 100_000)


@dataclass(frozen=True, slots=True)
class Row:
    """A policy's hits with one size; `leaves_only=False`: it was let take any block, not the ends of chains alone."""

    eviction: str
    leaves_only: bool
    num_blocks: int | None
    block_ratio: float
    token_ratio: float
    mean_request_ratio: float
    evictions: int
    us_per_block: float


@dataclass(frozen=True, slots=True)
class CostRow:
    """Microseconds of each call with so many blocks idle, in chains of 32."""

    eviction: str
    idle: int
    idle_us: float
    hit_us: float
    victim_us: float


def all_policies() -> list[str]:
    """Every registered policy as it comes, and some with other knobs."""
    return [*registry.names("eviction"), *MORE]


def anywhere(text: str, block_size: int) -> Callable[[], Eviction] | None:
    """How to make the policy so that it may evict blocks in mid-chain; None for one that has no such difference."""
    if not isinstance(getattr(make(text, block_size), "_idle", None), IdleBlocks):
        return None

    def made() -> Eviction:
        policy = make(text, block_size)
        policy._idle.leaves_only = False
        return policy  # type: ignore[no-any-return]

    return made


def make(text: str, block_size: int, future: dict[int, list[bytes]] | None = None) -> Any:
    """A policy by name; one that is told the future sees none by default."""
    return registry.make("eviction", text, block_size=block_size, seed=0, oracle={}, future=future or {})


def measure_hits(workload: Workload, console: Console, sizes: tuple[int | None, ...] = SIZES) -> list[Row]:
    """A row for each policy, size and rule about chains."""
    rows: list[Row] = []
    for text in all_policies():
        console.print(f"{text} ...", style="dim")
        rows += [_row(hits, True) for hits in study_workload(workload, [text], sizes)]
        free = anywhere(text, workload.hash_block)
        if free is not None and not registry.is_clairvoyant(free()):
            rows += [_row(hits, False) for hits in study_workload(workload, [(text, free)], sizes)]
    return rows


def _row(hits: CacheHits, leaves_only: bool) -> Row:
    return Row(
        hits.eviction,
        leaves_only,
        hits.num_blocks,
        round(hits.block_ratio, 5),
        round(hits.token_ratio, 5),
        round(hits.mean_request, 5),
        hits.evictions,
        round(1e6 * hits.seconds / hits.blocks, 2),
    )


def measure_cost(text: str, idle: int, samples: int = 20_000) -> CostRow:
    """Time each call of a policy that has `idle` blocks, before and after the victims that it gives up."""
    blocks = [
        CachedBlock(i, _key(i), i % 32, _key(i - 1) if i % 32 else None, references=0, hits=i // 32 % 5)
        for i in range(idle)
    ]
    policy = make(text, 16, {0: [block.key for block in blocks]})
    chains = [blocks[at : at + 32] for at in range(0, idle, 32)]
    started = time.perf_counter()
    for chain in chains:
        for block in reversed(chain):
            policy.on_idle(block, 0)
    idle_us = _us_since(started, idle)
    hit = [block for chain in chains[: samples // 32] for block in chain]
    started = time.perf_counter()
    for block in hit:
        policy.on_hit(block, 1)
    hit_us = _us_since(started, len(hit))
    for block in reversed(hit):
        policy.on_idle(block, 1)
    count = min(samples, idle // 2)
    started = time.perf_counter()
    for _ in range(count):
        policy.pop_victim(2)
    return CostRow(text, idle, idle_us, hit_us, _us_since(started, count))


def _key(i: int) -> bytes:
    return i.to_bytes(16, "big", signed=True)


def _us_since(started: float, count: int) -> float:
    return round(1e6 * (time.perf_counter() - started) / count, 3)


def show(rows: list[Row], costs: list[CostRow], console: Console, *, compare: bool) -> None:
    """The two tables."""
    sizes = list(dict.fromkeys(row.num_blocks for row in rows))
    table = Table(title="share of blocks hit, by number of blocks in the cache")
    table.add_column("eviction", no_wrap=True)
    for size in sizes:
        table.add_column("all" if size is None else f"{size:,}", justify="right")
    for title in ("tokens (all)", "us a block"):
        table.add_column(title, justify="right")
    for name, leaves_only in dict.fromkeys((row.eviction, row.leaves_only) for row in rows):
        own = [row for row in rows if (row.eviction, row.leaves_only) == (name, leaves_only)]
        label = name if leaves_only else f"{name} anywhere"
        table.add_row(
            label, *(f"{row.block_ratio:.4f}" for row in own), f"{own[-1].token_ratio:.4f}",
            f"{own[0].us_per_block:.1f}",
            style=None if leaves_only else "dim",
        )  # fmt: skip
        if compare and leaves_only and name in EARLIER:
            table.add_row(f"{name} (earlier figures)", *(f"{ratio:.4g}" for ratio in EARLIER[name]), style="cyan")
    console.print(table)
    table = Table(title="microseconds a call")
    table.add_column("eviction", no_wrap=True)
    for title in ("idle blocks", "on_idle", "on_hit", "pop_victim"):
        table.add_column(title, justify="right")
    for cost in costs:
        table.add_row(
            cost.eviction, f"{cost.idle:,}", f"{cost.idle_us:.2f}", f"{cost.hit_us:.2f}", f"{cost.victim_us:.2f}"
        )
    console.print(table)


def find_trace() -> Path | None:
    """Mooncake's conversation trace, where the environment says where traces are."""
    folder = os.environ.get("DIPTYCH_TRACES")
    path = Path(folder or "") / "mooncake" / "conversation_trace.jsonl.gz"
    return path if folder and path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, metavar="PATH", help="a trace with prefix blocks")
    parser.add_argument("--json", type=Path, metavar="PATH", help="save the figures here")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)  # a file has room for whole figures
    trace = options.trace or find_trace()
    if trace is None:
        workload = make_workload(WorkloadSpec(name="prefix-chat", n=4_000))
        console.print("no trace given or found: a generated workload stands in")
    else:
        workload = load(trace)
    rows = measure_hits(workload, console)
    costs = [measure_cost(text, idle) for text in all_policies() for idle in IDLE]
    show(rows, costs, console, compare=trace is not None and trace.name.startswith("conversation_trace"))
    if options.json is not None:
        settings = {
            "trace": workload.name,
            "requests": len(workload),
            "block_size": workload.hash_block,
            "costs": [{name: getattr(cost, name) for name in CostRow.__slots__} for cost in costs],
        }
        save(options.json, "eviction", settings, rows)
        console.print(f"saved to {options.json}")


if __name__ == "__main__":
    main()
