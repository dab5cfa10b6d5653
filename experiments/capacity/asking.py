"""What a rate comes to: in the simulator, in the runtime, or on a server."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.bench.spec import BenchSpec, check_bench
from experiments.capacity.objectives import Objective
from experiments.capacity.search import Probe
from experiments.capacity.stability import drift
from experiments.records import Run, read_run
from experiments.spec import RunSpec, SpecError
from experiments.sweeps.cell_run import write_json
from experiments.sweeps.cells import read_sweep
from experiments.sweeps.measuring import measured
from experiments.sweeps.running import Runner, run_cells
from experiments.sweeps.spec import Measure, Panel

Ask = Callable[[float], Probe]


def judged(
    rate: float,
    runs: Sequence[tuple[Run, Mapping[str, Any]]],
    objectives: Sequence[Objective],
    measure: Measure,
    tolerance: float,
) -> Probe:
    """A probe, of the runs of a rate and their figures. The queue is unstable where that is so of half of the runs."""
    loads, named, bearable = [], [], []
    for run, figures in runs:
        each = [(objective.load(figures), str(objective)) for objective in objectives]
        load, worst = max(each, default=(0.0, ""))
        loads.append(load)
        named.append(worst)
        grown = drift(run, measure.window)
        if not grown.stable(tolerance / 2):
            bearable.append(rate * (1 - grown.share))  # by the rate that was asked for, not the one that was drawn
    stable = 2 * len(bearable) < len(runs)
    served = None if stable else sum(bearable) / len(bearable)
    return Probe(rate, tuple(loads), stable, named[loads.index(max(loads))], served)


def in_panel(
    base: RunSpec,
    panel: Panel,
    seeds: int | Sequence[int],
    objectives: Sequence[Objective],
    measure: Measure,
    folder: Path,
    runner: Runner,
    tolerance: float,
) -> Ask:
    """Ask a panel: a run a seed at each rate, kept in the folder, so that a search that was stopped goes on.

    Raises SpecError for a run that fails.
    """

    def ask(rate: float) -> Probe:
        content = {
            "base": base.model_dump(mode="json", exclude_unset=True),
            "panel": panel,
            "variables": {"grid": {"workload.rate": [rate]}, "seeds": seeds},
        }
        cells = read_sweep(content).cells
        notes = run_cells(cells, folder, measure, runner=runner)
        runs = []
        for cell in cells:
            note = notes[cell.name]
            if note["status"] != "ok":
                raise SpecError(f"the run at {rate:g} requests/s failed: {note['error']}")
            runs.append((read_run(folder / "cells" / cell.name), note["figures"]))
        return judged(rate, runs, objectives, measure, tolerance)

    return ask


def on_server(
    fields: Mapping[str, Any],
    base: RunSpec,
    seeds: Sequence[int],
    objectives: Sequence[Objective],
    measure: Measure,
    folder: Path,
    api_key: str | None,
    tolerance: float,
) -> Ask:
    """Ask a server of the OpenAI API, from outside. `fields`: of a `BenchSpec`, but workload and seed. A rate that the
    folder has all runs of is not sent again."""
    from experiments.bench import prepare, run_bench
    from experiments.workloads import make_workload

    def one(rate: float, seed: int) -> Run:
        workload = base.workload.model_copy(update={"rate": rate, "seed": seed})
        spec = check_bench(**fields, workload=workload.model_dump(), seed=seed)
        place = folder / "client" / f"rate={rate:g}-seed={seed}"
        note = place / "asked.json"
        if not _asked(note, spec):
            note.unlink(missing_ok=True)
            outcome = run_bench(prepare(spec, make_workload(spec.workload), api_key), place, overwrite=True)
            if outcome.interrupted:
                raise KeyboardInterrupt
            write_json(note, {"spec": spec.model_dump(mode="json")})
        return read_run(place)

    def ask(rate: float) -> Probe:
        runs = [one(rate, seed) for seed in seeds]
        return judged(rate, [(run, measured(run, measure)) for run in runs], objectives, measure, tolerance)

    return ask


def _asked(note: Path, spec: BenchSpec) -> bool:
    """Whether that is what a note says was asked, with today's defaults for fields that it is older than."""
    try:
        return BenchSpec(**json.loads(note.read_text(encoding="utf-8"))["spec"]) == spec
    except (OSError, KeyError, TypeError, ValueError):  # nothing yet, or of another kind
        return False
