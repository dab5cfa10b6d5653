"""Sweeps: one run varied over any of its fields, on this machine's cores or on a Ray cluster.

`read_sweep` takes a YAML file, or a dictionary of the same fields, to its cells; `run_sweep` runs what a folder lacks
of them and writes the table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from experiments.sweeps.cells import Cell, Sweep, read_sweep
from experiments.sweeps.local import LocalRunner
from experiments.sweeps.running import Runner, Say, run_cells, start, state_of
from experiments.sweeps.spec import Measure, SweepSpec, Window
from experiments.sweeps.summary import markdown
from experiments.sweeps.table import results, write_results

__all__ = [
    "Cell",
    "LocalRunner",
    "Measure",
    "Sweep",
    "SweepSpec",
    "Window",
    "read_sweep",
    "run_cells",
    "run_sweep",
    "state_of",
]


def run_sweep(
    sweep: Sweep,
    folder: str | Path,
    *,
    runner: Runner | None = None,
    processes: int = 1,
    keep_outdated: bool = False,
    say: Say = lambda cell, note: None,
) -> pd.DataFrame:
    """Run what a folder lacks of a sweep, and write its results; the table, one row a cell.

    `runner`: what runs the cells; None: as many processes of this machine. Raises SpecError for a folder that holds
    something else, or in which another sweep is running.
    """
    folder = Path(folder)
    start(sweep, folder)
    with LocalRunner(processes) as local:
        how: Any = {"runner": runner or local, "keep_outdated": keep_outdated, "say": say}
        notes = run_cells(sweep.cells, folder, sweep.spec.measure, **how)
    table = results(sweep, notes)
    write_results(table, folder)
    (folder / "summary.md").write_text(markdown(sweep, table, folder / "cells"), encoding="utf-8")
    return table
