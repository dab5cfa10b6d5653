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

Each run is noted in build/schedulers.jsonl when it ends, so that what is stopped goes on where it was, unless the code
of policies, simulator or experiments is another by then. In the end the
figures go into benchmarks/results/schedulers.json and, as tables, into docs/comparison.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.saving import save
from experiments.metrics import summarize
from experiments.records import Run, read_run
from experiments.simulated import run_simulated
from experiments.spec import RunSpec, SpecError, check_spec
from experiments.timeline import timeline
from experiments.workloads import Workload, WorkloadSpec, make_workload
from policies import registry
from policies.contract import RankedQueue
from policies.control_plane import PolicyStalled

ROOT = Path(__file__).parent
NOTES = ROOT.parent / "build" / "schedulers.jsonl"
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


@lru_cache(maxsize=4)
def _workload(spec: str) -> Workload:
    """Reading a trace takes as long as simulating its first requests: done once for all stacks."""
    return make_workload(WorkloadSpec.model_validate_json(spec))


def _run(spec: RunSpec, folder: Path) -> Run:
    run_simulated(spec, folder, workload=_workload(spec.workload.model_dump_json()))
    return read_run(folder)


def simulate(path: Path, trace: Trace, load: float, rate: float | None, stack: dict[str, str], quick: bool) -> Row:
    """One cell of the table. A policy that cannot take the load says why in `error`."""
    with TemporaryDirectory() as scratch:
        try:
            run = _run(specification(path, trace, rate, stack, quick), Path(scratch) / "run")
        except (PolicyStalled, SpecError) as failure:
            return Row(trace.name, load, stack["scheduler"], stack["queue"], False, str(failure), {})
        return Row(trace.name, load, stack["scheduler"], stack["queue"], run.clairvoyant, "", figures_of(run))


def throughput(path: Path, trace: Trace, quick: bool) -> float:
    """Requests a second that the reference stack finishes when all arrive at once, as long as somebody waits.

    `quick` has too few requests to measure that: the mean over the whole run.
    """
    with TemporaryDirectory() as scratch:
        run = _run(specification(path, trace, None, REFERENCE, quick), Path(scratch) / "run")
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
    code = fingerprint()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, TextColumn("left:"), TimeRemainingColumn(), console=console, transient=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool, progress as bar:
        capacities = list(pool.map(throughput, paths, TRACES, [quick] * len(TRACES)))
        cells = [(i, load, stack) for i in range(len(TRACES)) for load in LOADS for stack in stacks()]
        keys = [
            json.dumps([code, quick, capacities[i], TRACES[i].n, TRACES[i].name, load, stack])
            for i, load, stack in cells
        ]
        noted = _noted(NOTES)
        rows = {number: Row(**noted[key]) for number, key in enumerate(keys) if key in noted}
        task = bar.add_task("simulating", total=len(cells), completed=len(rows))
        futures = {
            pool.submit(simulate, paths[i], TRACES[i], load, load * capacities[i], stack, quick): number
            for number, (i, load, stack) in enumerate(cells)
            if number not in rows
        }
        NOTES.parent.mkdir(exist_ok=True)
        with NOTES.open("a") as notes:
            notes.write("\n")  # after a line that was being written when it was stopped
            for future in as_completed(futures):
                number = futures[future]
                rows[number] = future.result()
                notes.write(json.dumps({"key": keys[number], "row": asdict(rows[number])}) + "\n")
                notes.flush()
                bar.advance(task)
    names = [trace.name for trace in TRACES]
    return [rows[i] for i in range(len(cells))], dict(zip(names, capacities, strict=True))


def fingerprint() -> str:
    """Of the code that makes the figures: rows of other code are not taken over."""
    files = [ROOT / "schedulers.py"]
    for folder in ("policies", "simulator", "experiments"):
        files += (ROOT.parent / folder).rglob("*.py")
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def _noted(notes: Path) -> dict[str, Any]:
    """The rows of a comparison that was stopped, by what they are of; without a line that was cut off."""
    found = {}
    for line in notes.read_text().splitlines() if notes.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[entry["key"]] = entry["row"]
    return found


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
    NOTES.unlink(missing_ok=True)
    console.print(f"saved to {ROOT / 'results' / 'schedulers.json'} and {page}")


if __name__ == "__main__":
    main()
