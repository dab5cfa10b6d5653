"""The simulator beside Vidur, on the same requests and step times: `python -m benchmarks.vidur FOLDER [--json PATH]`.

FOLDER holds what Vidur was given and how long it said that steps take: `requests.csv.gz` (request_id, arrived_at_s,
num_prefill_tokens, num_decode_tokens) and `steptime_a100_llama2_7b.npz`. Vidur (microsoft/vidur at 7d47513) ran it with
its Sarathi scheduler, chunk 512, at most 128 sequences, blocks of 16, 1% watermark, one replica, no host time; ours is
the `sarathi` policy with the same settings. One core, one process; the run is recorded, decisions too.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import math
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import simpy
from rich.console import Console
from rich.table import Table

from benchmarks.saving import cpu_name, save
from experiments.records import RunWriter, read_run, run_info
from experiments.records.environment import is_compiled
from policies.replica_state import Limits
from policies.request import Request
from policies.shapes import StepShape
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.base import StepCost
from simulator.simulation import Simulation

LIMITS = Limits(
    num_blocks=6_900,
    max_num_seqs=128,
    max_num_batched_tokens=640,  # 512 of the chunk, and every decode beside it
    max_model_len=4_096 + 1,
    prefix_caching=False,
)
STACK = StackSpec(scheduler="sarathi,chunk_size=512", admission="watermark,watermark=0.01")
VIDUR = {
    "TTFT": (0.1470, 0.4966, 0.9353, 0.2282),
    "TPOT": (0.02594, 0.03584, 0.04759, 0.02696),
    "E2E": (3.696, 12.478, 17.238, 5.790),
}
"""Its answer in seconds at p50, p90, p99, and the mean."""
VIDUR_MAKESPAN_S, VIDUR_STEPS = 2375.4, 93_974
VIDUR_SPEED = {"metrics off": (833, 7_800), "metrics on": (625, 5_870)}
"""(requests, steps) a second on one core."""
REFERENCE_TIMEOUTS_PER_S = 1.48e6
"""Of bare SimPy on the machine on which Vidur was run."""


class VidurCost:
    """Vidur's predictor, from the table of its answers. Times are per layer in milliseconds; there are 32 layers."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as table:
            self._tokens = table["tok_ms_per_layer"].tolist()
            self._decode = table["decode_ms_per_layer"].tolist()
            self._prefill = table["prefill_ms_per_layer"].tolist()
            self._layers = int(table["layers"])

    def step_ns(self, shape: StepShape) -> int:
        decodes, context, _, chunks, tokens, _, end, squares, *_ = shape
        ms = self._tokens[-(-(decodes + tokens) // 8) * 8]
        if decodes:
            before = context // decodes - 1  # without the token that the step computes
            ms += self._decode[decodes][-(-before // 64)]
        if chunks:
            # At most one chunk does not start at 0: the partial prefill goes first, and nothing is cached.
            ms += self._prefill[-(-(end - tokens) // 64)][round(math.sqrt(squares))]
        return int(self._layers * ms * 1e6 + 0.5)

    def cost(self, shape: StepShape) -> StepCost:
        return tuple.__new__(StepCost, (0, self.step_ns(shape), 0))  # as its constructor would, in a third of the time

    def inside(self, shape: StepShape) -> bool:
        return True

    def describe(self) -> dict[str, object]:
        return {"kind": "vidur", "layers": self._layers}


def arrivals(path: Path) -> list[Arrival]:
    frame = pd.read_csv(path)
    rows = zip(frame.arrived_at_s, frame.num_prefill_tokens.tolist(), frame.num_decode_tokens.tolist(), strict=True)
    return [Arrival(Request(i, round(at * 1e9), p, d), d) for i, (at, p, d) in enumerate(rows)]


@dataclass(frozen=True, slots=True)
class Row:
    """One run. Speeds per second of this process's processor time, writing the records included."""

    name: str
    requests: int
    steps: int
    taken_together: float  # share of the steps that the policy was not asked for
    events: int
    seconds: float
    requests_per_s: float
    steps_per_s: float
    events_per_s: float
    makespan_s: float
    peak_mib: float
    timeouts_per_s: float  # of bare SimPy in this process, before and after
    reference_requests_per_s: float  # where those are `REFERENCE_TIMEOUTS_PER_S`
    latencies_s: dict[str, list[float]]  # at p50, p90, p99, and the mean


def run(folder: Path, costs: VidurCost, *, together: bool) -> Row:
    """Simulate the scenario once, with its records, in a folder that is thrown away."""
    todo = arrivals(folder / "requests.csv.gz")
    bare = timeouts_per_s()
    with tempfile.TemporaryDirectory() as out:
        info = run_info("sim", spec={}, limits={}, stack=STACK.as_dict(), clairvoyant=False, workload={})
        gc.collect()
        began = time.process_time()
        with RunWriter(out, info, flush_seconds=None) as writer:
            simulation = Simulation(LIMITS, [STACK.build()], costs, recorder=writer, together=together)
            plane = simulation.replicas[0].plane
            end_ns = simulation.run(todo)
        seconds = time.process_time() - began
        latencies = _latencies(read_run(out).requests)
    bare = (bare + timeouts_per_s()) / 2
    asked, events = plane.num_asked, next(simulation.env._eid)  # counts what was ever scheduled
    return Row(
        "together" if together else "one by one",
        len(todo),
        plane.next_step,
        1 - asked / plane.next_step,
        events,
        seconds,
        len(todo) / seconds,
        plane.next_step / seconds,
        events / seconds,
        end_ns / 1e9,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        bare,
        len(todo) / seconds / bare * REFERENCE_TIMEOUTS_PER_S,
        latencies,
    )


def timeouts_per_s() -> float:
    """How many timeouts a second bare SimPy takes in this process: what to compare machines, and busy hours, by."""
    count, env = 200_000, simpy.Environment()

    def sleeper() -> Iterator[simpy.Event]:
        for _ in range(count):
            yield env.timeout(1)

    env.process(sleeper())
    began = time.process_time()
    env.run()
    return count / (time.process_time() - began)


def _latencies(requests: pd.DataFrame) -> dict[str, list[float]]:
    ttft = (requests.first_token_ns - requests.arrival_ns) / 1e9
    e2e = (requests.finish_ns - requests.arrival_ns) / 1e9
    tpot = (e2e - ttft) / (requests.output_tokens - 1)
    return {
        name: [*(float(np.percentile(values, q)) for q in (50, 90, 99)), float(values.mean())]
        for name, values in (("TTFT", ttft), ("TPOT", tpot), ("E2E", e2e))
    }


def show(rows: list[Row], console: Console) -> None:
    """Two tables: speed, here and as it would be on the machine that ran Vidur, and how far the answers are apart."""
    how = "compiled" if is_compiled() else "interpreted"
    table = Table(title=f"10,000 requests on one core, {how}, here and on the machine of the reference")
    for heading in (
        "",
        "requests/s",
        "bare SimPy/s",
        "reference: requests/s",
        "to Vidur",
        "steps/s",
        "together",
        "MiB",
    ):
        table.add_column(heading, justify="right" if heading else "left")
    for name, (requests, steps) in VIDUR_SPEED.items():
        table.add_row(f"Vidur, {name}", "", "", f"{requests:,}", "", f"{steps:,}", "", "")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.requests_per_s:,.0f}",
            f"{row.timeouts_per_s:,.0f}",
            f"{row.reference_requests_per_s:,.0f}",
            f"{row.reference_requests_per_s / VIDUR_SPEED['metrics off'][0]:.2f}",
            f"{row.reference_requests_per_s * row.steps / row.requests:,.0f}",
            f"{row.taken_together:.1%}",
            f"{row.peak_mib:,.0f}",
        )
    console.print(table)
    table = Table(title="Seconds (and difference to Vidur)")
    for heading in ("", "p50", "p90", "p99", "mean"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, ours in rows[-1].latencies_s.items():
        pairs = zip(ours, VIDUR[name], strict=True)
        table.add_row(name, *(f"{mine:.4g} ({mine / theirs - 1:+.2%})" for mine, theirs in pairs))
    console.print(table)
    row = rows[-1]
    console.print(
        f"Makespan {row.makespan_s:.1f} s ({row.makespan_s / VIDUR_MAKESPAN_S - 1:+.3%}), "
        f"{row.steps:,} steps ({row.steps - VIDUR_STEPS:+,})"
    )


def remember(path: Path, rows: list[Row]) -> None:
    """Add a line for each row to what was measured before."""
    revision = subprocess.run(("git", "describe", "--always", "--dirty"), capture_output=True, text=True, check=False)
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(
                ("date", "revision", "device", "steps", "timeouts_per_s", "requests_per_s", "reference_requests_per_s")
            )
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        for row in rows:
            figures = (row.timeouts_per_s, row.requests_per_s, row.reference_requests_per_s)
            name = f"{row.name}, compiled" if is_compiled() else row.name
            writer.writerow((today, revision.stdout.strip(), cpu_name(), name, *map(round, figures)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with requests.csv.gz and steptime_a100_llama2_7b.npz")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/vidur.json"), help="for the figures")
    history = Path("benchmarks/results/vidur-history.csv")
    parser.add_argument("--history", type=Path, default=history, help="for a line a measurement")
    arguments = parser.parse_args()
    try:
        costs = VidurCost(arguments.folder / "steptime_a100_llama2_7b.npz")
    except FileNotFoundError as error:
        parser.error(f"{error.filename} is missing; name the folder that holds the scenario")
    rows = [run(arguments.folder, costs, together=together) for together in (False, True)]
    show(rows, Console(width=110))
    header = {"reference_timeouts_per_s": REFERENCE_TIMEOUTS_PER_S, "compiled": is_compiled()}
    save(arguments.json, "vidur", header, rows)
    remember(arguments.history, rows)


if __name__ == "__main__":
    main()
