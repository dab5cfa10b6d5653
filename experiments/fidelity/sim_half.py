"""The simulated panel's half: every real record replayed, its steps priced, its requests simulated. Needs no device."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from math import inf
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from experiments.attribution import attribute
from experiments.compare import Comparison, compare
from experiments.divergence import diff_decisions
from experiments.fidelity.capacity import capacity, card, saturated
from experiments.fidelity.choices import RANKED
from experiments.fidelity.matrix import Cell
from experiments.fidelity.noise import half_widths
from experiments.fidelity.steps import step_errors
from experiments.metrics import per_request
from experiments.records import Run, RunError, read_run
from experiments.replaying import replay_run, simulate_record
from policies.replica_state import Limits
from simulator.costs.fitted import FittedCost

FIGURES = {
    "output_throughput": "Output tokens/s",
    "mean_ttft": "TTFT mean",
    "p99_ttft": "TTFT p99",
    "mean_tpot": "TPOT mean",
    "p99_tpot": "TPOT p99",
    "mean_e2el": "E2E mean",
    "p99_e2el": "E2E p99",
}
"""What is compared of free-running runs -> how it is called."""


def evaluate(folder: Path, *, processes: int = 1, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Everything that the records in a folder tell, as JSON values; also written to FOLDER/fidelity.json.

    A record that cannot be evaluated is among the failed ones, with the reason. Raises RunError where there is none.
    """
    names = sorted(path.parent.name for path in (folder / "runs").glob("*/run.json"))
    if not names:
        raise RunError(f"{folder} holds no runs; make some with diptych validate on the machine to be measured")
    if processes > 1:
        with ProcessPoolExecutor(min(processes, len(names)), mp_context=get_context("spawn")) as pool:
            tried = dict(zip(names, pool.map(_try_cell, [folder] * len(names), names), strict=True))
    else:
        tried = {}
        for name in names:
            tried[name] = _try_cell(folder, name)
            say(f"{name}: evaluated")
    results = {name: result for name, result in tried.items() if not isinstance(result, str)}
    cells = [Cell.parse(name) for name in results]
    for cell in cells:
        results[cell.name]["floor"] = _floor(folder, cell, cells)
    path = folder / "failed.json"
    failed = json.loads(path.read_text()) if path.exists() else {}
    failed |= {name: result for name, result in tried.items() if isinstance(result, str)}
    found = {
        "format": "diptych-fidelity-1",
        "calibrations": {path.stem: _calibration(path) for path in sorted((folder / "calibrations").glob("*.json"))},
        "capacities": {work: capacity(folder, work) for work in sorted({cell.work for cell in cells})},
        "cells": results,
        "noise": _noise(folder, cells),
        "failed": failed,
    }
    partial = folder / "fidelity.json.partial"
    partial.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    os.replace(partial, folder / "fidelity.json")
    return found


def _try_cell(folder: Path, name: str) -> dict[str, Any] | str:
    """What `evaluate_cell` found, as long as it is JSON, or why there is nothing: the other cells are kept."""
    try:
        found = evaluate_cell(folder, name)
        json.dumps(found, allow_nan=False)
    except Exception as error:
        return f"not evaluated: {type(error).__name__}: {' '.join(str(error).split())}"
    return found


def evaluate_cell(folder: Path, name: str) -> dict[str, Any]:
    """One cell: its decisions replayed, its step times, and its figures beside the simulation's."""
    run = read_run(folder / "runs" / name)
    costs = calibration_of(folder, run)
    with tempfile.TemporaryDirectory() as scratch:
        replay_run(run, Path(scratch) / "replay", check=False)
        divergence = diff_decisions(run, read_run(Path(scratch) / "replay"))
        simulate_record(run, costs, Path(scratch) / "sim")
        simulated = read_run(Path(scratch) / "sim")
        check_same_limits(run, simulated, costs)
        comparison = compare(run, simulated, decisions=False)
        sustained = [saturated(run), saturated(simulated)] if Cell.parse(name).load is None else None
        figures = figures_of(comparison)
        attributed = attribute(run, simulated, costs)
        spreads = {key: spread.p90_ape for key, spread in comparison.spreads.items() if spread.p90_ape is not None}
    cell = Cell.parse(name)
    return {
        "work": cell.work,
        "load": cell.load,
        "policy": cell.policy,
        "repeat": cell.repeat,
        "card": card(run.info["hardware"]),
        "requests": len(run.requests),
        "completed": comparison.matched,
        "preemptions": [comparison.summary_a["preemptions"], comparison.summary_b["preemptions"]],
        "decisions": {
            "identical": divergence is None,
            "steps": int(run.steps["step"].nunique()),
            "different": 0 if divergence is None else divergence.num_steps,
        },
        "steps": step_errors(run, costs),
        "attribution": {latency: attributed.shares(latency) for latency in attributed.latencies},
        "sustained": sustained,
        "figures": figures,
        "per_request_p90": spreads,
        "goodput": [comparison.summary_a["slo_goodput"], comparison.summary_b["slo_goodput"]],
    }


def figures_of(comparison: Comparison) -> dict[str, list[float | None]]:
    """Figure -> [real, simulated]: of the requests that both completed."""
    found = {"output_throughput": comparison.throughputs["output_throughput"]}
    for key in FIGURES:
        statistic, _, latency = key.partition("_")
        if latency in comparison.latencies:
            found[key] = comparison.latencies[latency][statistic]
    return {key: [pair.a, pair.b] for key, pair in found.items()}


def calibration_of(folder: Path, run: Run) -> FittedCost:
    """The cost model of the card that a run was on. Raises RunError where there is none."""
    path = folder / "calibrations" / f"{card(run.info['hardware'])}.json"
    if not path.exists():
        raise RunError(f"{path} is missing: {run.name} ran on a card that was not profiled")
    return FittedCost.load(path)


def check_same_limits(real: Run, simulated: Run, costs: FittedCost) -> None:
    """Raises RunError unless blocks, budgets and captured sizes are the same: those of the runtime.

    The calibration's may have more blocks, and cache prefixes or not: its step times are the same.
    """
    if real.limits != simulated.limits:
        raise RunError(f"{real.name}: the simulation's limits are not the runtime's")
    of_run = TypeAdapter(Limits).validate_python(real.limits)
    measured = TypeAdapter(Limits).validate_python(costs.calibration.provenance["limits"])
    for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "capture_sizes", "mixed_capture_sizes", "lag"):
        if getattr(of_run, name) != getattr(measured, name):
            raise RunError(
                f"{real.name}: {name} is {getattr(of_run, name)}, the calibration's {getattr(measured, name)}"
            )


def _floor(folder: Path, cell: Cell, cells: Sequence[Cell]) -> dict[str, float] | None:
    """How far the cell's repeats are from it at most, by figure; None where it was run once."""
    same = [c for c in cells if (c.work, c.load, c.policy) == (cell.work, cell.load, cell.policy) and c != cell]
    if not same:
        return None
    run, floor = read_run(folder / "runs" / cell.name), dict.fromkeys(FIGURES, 0.0)
    for other in same:
        repeat = read_run(folder / "runs" / other.name)
        for key, (one, two) in figures_of(compare(run, repeat, decisions=False)).items():
            if one and two is not None:
                floor[key] = max(floor[key], abs(two - one) / one)
    return floor


def _noise(folder: Path, cells: Sequence[Cell]) -> dict[str, list[tuple[str, str, float | None]]]:
    """WORK~LOAD~FIGURE -> (policy, policy, milliseconds of noise between them), where three or more were run.

    None: no request has the latency under both.
    """
    found = {}
    for work, load in sorted({(cell.work, cell.load) for cell in cells if cell.load is not None}):
        here = [cell for cell in cells if (cell.work, cell.load, cell.repeat) == (work, load, 0)]
        if len(here) < 3:
            continue
        frames = {cell.policy: per_request(read_run(folder / "runs" / cell.name)) for cell in here}
        for figure in RANKED:
            widths = half_widths(frames, figure)
            noise = [(*pair, width if width < inf else None) for pair, width in widths.items()]
            found[f"{work}~{load:g}~{figure}"] = noise
    return found


def _calibration(path: Path) -> dict[str, Any]:
    calibration = FittedCost.load(path).calibration
    kept = ("hardware", "software", "model", "dtype", "started_at", "git", "num_steps", "gpu_before", "gpu_after")
    return {
        "provenance": {name: calibration.provenance[name] for name in kept if name in calibration.provenance},
        "held_out": [error.model_dump() for error in calibration.held_out],
    }
