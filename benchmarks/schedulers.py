"""All schedulers and queues on four traces at three loads: `python -m benchmarks.schedulers TRACES [--quick]`.

TRACES is a folder with the public traces in it, by their published file names, at any depth. Each trace's first
requests are simulated on one H100 (Llama-3.1-8B in bf16, from the device's data sheet) with 20 GiB for the KV cache, so
that memory is short under load. Capacity is what `mixed` with `fcfs` finishes a second when all arrive at once, for as
long as somebody waits: the end, where the replica empties, would make it look smaller. A load is the trace's own
arrivals, sped up or slowed down to 70%, 90% and 110% of that on average. How many wait under `mixed` with `fcfs` when
the last request comes stands above each table: it says whether a load is one.

Half of the requests, at random, are interactive (TTFT 0.5 s, TPOT 50 ms, priority 0), half relaxed (5 s, 200 ms, 1);
all may be shed by a policy that does. Clients declare their output length with a lognormal error of 0.5. Where a trace
has no tenants there are four, with 8, 4, 2 and 1 parts of the requests.

Runs are cells of a sweep (`experiments.sweeps`) in build/schedulers, so that what is stopped goes on where it was,
unless the code of policies, simulator or experiments is another by then. In the end the figures go into
benchmarks/results/schedulers.json and, as tables, into docs/comparison.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.saving import save
from experiments.metrics import summarize
from experiments.records import Run, read_run
from experiments.spec import RunSpec, check_spec
from experiments.sweeps import Cell, LocalRunner, Measure, read_sweep, run_cells
from experiments.timeline import timeline
from policies import registry
from policies.contract import RankedQueue

ROOT = Path(__file__).parent
RUNS = ROOT.parent / "build" / "schedulers"
LOADS = (0.7, 0.9, 1.1)
SHARES = {"a": 8.0, "b": 4.0, "c": 2.0, "d": 1.0}
CLASSES = [
    {"ttft_ms": 500, "tpot_ms": 50, "priority": 0, "droppable": True},
    {"ttft_ms": 5000, "tpot_ms": 200, "priority": 1, "droppable": True},
]


@dataclass(frozen=True)
class Trace:
    """A trace's name in the tables, its file, how much of it is taken, and what it does not say itself."""

    name: str
    file: str
    n: int
    tenants: dict[str, float] | None


TRACES = (
    Trace("Azure conversation", "AzureLLMInferenceTrace_conv.csv", 1200, SHARES),
    Trace("Azure code", "AzureLLMInferenceTrace_code.csv", 600, SHARES),
    Trace("Mooncake conversation", "conversation_trace.jsonl.gz", 120, SHARES),
    Trace("VTC arena", "vtc_arena_real_trace.csv", 1500, None),
)
LATENCIES = ("ttft", "tpot", "e2el")
REFERENCE = {"scheduler": "mixed", "queue": "fcfs"}


@dataclass(frozen=True)
class Row:
    """One stack on one trace at one load. `figures`: of `figures_of`; none where the policy could not take the load."""

    trace: str
    load: float
    scheduler: str
    queue: str
    clairvoyant: bool
    error: str
    figures: dict[str, float | None]


def figures_of(run: Run) -> dict[str, float | None]:
    """Means and 99th percentiles of TTFT, TPOT and E2E in milliseconds, and what else the tables have.

    None where there is nothing to take it of: nobody completed, or no two tenants ever waited at once.
    """
    summary = summarize(run)
    latencies = {f"{kind}_{name}_ms": summary[f"{kind}_{name}_ms"] for name in LATENCIES for kind in ("mean", "p99")}
    return {
        **latencies,
        "goodput": summary["slo_goodput"],
        "service_gap": summary["largest_service_gap"],
        "preemptions": summary["preemptions"],
        "completed": summary["completed"],
        "dropped": summary["statuses"]["dropped"],
        "waiting_at_last_arrival": waiting_at_last_arrival(run),
    }


def waiting_at_last_arrival(run: Run) -> int:
    """How many requests wait after the plan before the last one comes: under overload it grows with the run."""
    states = timeline(run)
    at = int(states["t_ns"].searchsorted(run.requests["arrival_ns"].max(), side="right")) - 1
    return int(states["waiting"].iloc[max(at, 0)])


def stacks() -> list[dict[str, str]]:
    """Every scheduler with `fcfs`; every queue under `mixed`, and under `preemptive` where it can."""
    made = [REFERENCE]
    made += [{"scheduler": name, "queue": "fcfs"} for name in registry.names("scheduler") if name != "preemptive"]
    for name in registry.names("queue"):
        made.append({"scheduler": "mixed", "queue": name})
        if isinstance(registry.make("queue", name, block_size=16, seed=0, oracle={}), RankedQueue):
            made.append({"scheduler": "preemptive", "queue": name})
    made += [{"scheduler": "mixed", "queue": f"sjf,predictor={name}"} for name in registry.names("predictor")]
    return [stack for i, stack in enumerate(made) if stack not in made[:i]]


def specification(path: Path, trace: Trace, rate: float | None, stack: dict[str, str], quick: bool) -> RunSpec:
    """One run. `rate` None: all arrive at once."""
    workload: dict[str, Any] = {"name": str(path), "n": trace.n // 10 if quick else trace.n, "declared_sigma": 0.5}
    workload |= {"arrivals": "at-once"} if rate is None else {"rate": rate}
    workload |= {"slo": CLASSES, "tenants": trace.tenants}
    limits = {"kv_cache_gib": 20, "max_model_len": 131_072}
    return check_spec({"workload": workload, "policies": stack, "limits": limits, "decisions": False})


def cells_of(path: Path, trace: Trace, rate: float | None, stacks: Sequence[dict[str, str]], quick: bool) -> list[Cell]:
    """The stacks on a trace at a rate, as cells of a sweep."""
    base = specification(path, trace, rate, REFERENCE, quick).model_dump(mode="json", exclude_defaults=True)
    variables = {f"policies.{role}": [stack[role] for stack in stacks] for role in REFERENCE}
    return read_sweep({"base": base, "panel": "sim", "variables": {"zip": variables}}).cells


def row_of(cell: Cell, note: Mapping[str, Any], trace: Trace, load: float) -> Row:
    """One cell of the table. A policy that cannot take the load says why in `error`."""
    stack = {role: cell.values[f"policies.{role}"] for role in REFERENCE}
    if note["status"] != "ok":
        return Row(trace.name, load, **stack, clairvoyant=False, error=note["error"], figures={})
    run = read_run(RUNS / "cells" / cell.name)
    return Row(trace.name, load, **stack, clairvoyant=run.clairvoyant, error="", figures=figures_of(run))


def throughput(cell: Cell, quick: bool) -> float:
    """Requests a second that the reference stack finished when all arrived at once, as long as somebody waited.

    `quick` has too few requests to measure that: the mean over the whole run.
    """
    run = read_run(RUNS / "cells" / cell.name)
    return float(summarize(run)["request_throughput"]) if quick else saturated(run)


def saturated(run: Run) -> float:
    """Requests a second that ended until, for the first time, nobody waits after a plan."""
    states = timeline(run)
    until = int(states["t_ns"][states["waiting"] == 0].iloc[0])
    ended = int((run.requests["finish_ns"] <= until).sum())
    if not ended:
        raise ValueError(f"nobody of {len(run.requests)} requests ended before all ran: too few to measure a capacity")
    return ended / (until / 1e9)


def measure(folder: Path, quick: bool, console: Console) -> tuple[list[Row], dict[str, float]]:
    """All rows, in the order of the tables, and each trace's capacity in requests a second."""
    paths = [_find(folder, trace.file) for trace in TRACES]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, TextColumn("left:"), TimeRemainingColumn(), console=console, transient=True)
    with LocalRunner(os.cpu_count() or 1) as runner, progress as bar:
        at_once = [
            cells_of(path, trace, None, [REFERENCE], quick)[0] for path, trace in zip(paths, TRACES, strict=True)
        ]
        run_cells(at_once, RUNS, Measure(), runner=runner)
        capacities = [throughput(cell, quick) for cell in at_once]
        loads = [(trace, load) for trace in range(len(TRACES)) for load in LOADS]
        cells = [
            cells_of(paths[trace], TRACES[trace], load * capacities[trace], stacks(), quick) for trace, load in loads
        ]
        task = bar.add_task("simulating", total=sum(map(len, cells)))
        everything = [cell for of_load in cells for cell in of_load]
        notes = run_cells(everything, RUNS, Measure(), runner=runner, say=lambda cell, note: bar.advance(task))
    rows = [
        row_of(cell, notes[cell.name], TRACES[trace], load)
        for (trace, load), of_load in zip(loads, cells, strict=True)
        for cell in of_load
    ]
    return rows, dict(zip([trace.name for trace in TRACES], capacities, strict=True))


def _find(folder: Path, file: str) -> Path:
    found = next(folder.rglob(file), None)
    if found is None:
        raise SystemExit(f"{folder} has no {file} at any depth; docs/comparison.md says where it is from")
    return found


TITLES = ["scheduler", "queue", "TTFT mean", "p99", "TPOT mean", "p99", "E2E mean", "p99"]
TITLES += ["goodput", "service gap", "preemptions", "dropped"]


def markdown(rows: list[Row], capacities: dict[str, float]) -> Iterator[str]:
    """The tables: one a trace and load, times in seconds but TPOT in milliseconds."""
    for trace in TRACES:
        yield f"\n## {trace.name}: capacity {capacities[trace.name]:.2f} requests/s"
        for load in LOADS:
            here = [row for row in rows if (row.trace, row.load) == (trace.name, load)]
            reference = next(row for row in here if (row.scheduler, row.queue) == tuple(REFERENCE.values()))
            waiting = reference.figures["waiting_at_last_arrival"]
            yield f"\n### At {load:.0%}: {waiting:.0f} wait when the last request comes\n"
            yield f"| {' | '.join(TITLES)} |"
            yield "| --- | --- |" + " ---: |" * (len(TITLES) - 2)
            yield from map(_line, here)


def _line(row: Row) -> str:
    queue = row.queue + (" (clairvoyant)" if row.clairvoyant else "")
    if row.error:
        return f"| {row.scheduler} | {queue} | {row.error} |" + " |" * (len(TITLES) - 3)
    figures = row.figures

    def cell(name: str, digits: int, scale: float = 1.0) -> str:
        value = figures[name]
        return "-" if value is None else f"{value / scale:,.{digits}f}"

    cells = [cell(f"{kind}_ttft_ms", 2, 1e3) for kind in ("mean", "p99")]
    cells += [cell(f"{kind}_tpot_ms", 1) for kind in ("mean", "p99")]
    cells += [cell(f"{kind}_e2el_ms", 2, 1e3) for kind in ("mean", "p99")]
    cells += [cell("goodput", 2), *(cell(name, 0) for name in ("service_gap", "preemptions", "dropped"))]
    return "| " + " | ".join([row.scheduler, queue, *cells]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, metavar="TRACES", help="the folder with the traces")
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the requests; prints the tables, saves nothing"
    )
    options = parser.parse_args()
    console = Console(stderr=True)
    rows, capacities = measure(options.traces, options.quick, console)
    lines = list(markdown(rows, capacities))
    if options.quick:
        print("\n".join(lines))
        return
    settings = {
        "command": "python -m benchmarks.schedulers TRACES",
        "model": "llama-3.1-8b, bfloat16, roofline of h100-sxm",
        "kv_cache_gib": 20,
        "requests": {trace.name: trace.n for trace in TRACES},
        "capacity": capacities,
    }
    save(ROOT / "results" / "schedulers.json", "schedulers", settings, rows)
    page = ROOT.parent / "docs" / "comparison.md"
    head = page.read_text().split("<!-- tables -->", 1)[0]
    page.write_text(head + "<!-- tables -->\n" + "\n".join(lines) + "\n")
    shutil.rmtree(RUNS)
    console.print(f"saved to {ROOT / 'results' / 'schedulers.json'} and {page}")


if __name__ == "__main__":
    main()
