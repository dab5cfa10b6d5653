"""Runs and sweeps as one table for figures: a row a run, with what was varied and every figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.records import RunError, read_run
from experiments.study import OBJECTIVES, number, study_row

RESULTS = "results.parquet"
"""What a sweep's folder has."""


def gather(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows of run folders, of folders of them, and of sweeps: `policy`, `kind`, `knobs` (field -> value), figures.

    Raises RunError where a path holds neither.
    """
    rows: list[dict[str, Any]] = []
    for path in paths:
        if (path / RESULTS).is_file():
            rows += _of_sweep(pd.read_parquet(path / RESULTS))
            continue
        folders = [path] if (path / "run.json").is_file() else sorted(each.parent for each in path.glob("*/run.json"))
        if not folders:
            raise RunError(f"{path} is no run, no folder of runs and no sweep's")
        rows += [study_row(read_run(folder)) for folder in folders]
    return rows


def _of_sweep(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Of the cells that ended well. What was varied stands between `cell` and `panel`."""
    columns = list(table.columns)
    varied = columns[1 : columns.index("panel")]
    rows: list[dict[str, Any]] = []
    for row in table[table["status"] == "ok"].to_dict("records"):
        knobs = {str(field): number(row[field]) for field in varied if row[field] is not None}
        names = [str(value) for field, value in knobs.items() if isinstance(value, str) and field != "seed"]
        figures = {str(key): value for key, value in row.items() if key not in varied}
        rows.append({**figures, "policy": " + ".join(names) or "all", "kind": row["panel"], "knobs": knobs})
    return rows


def figures_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the figures that some row has: the known objectives first."""
    found = {
        key for row in rows for key, value in row.items() if isinstance(value, int | float) and key != "clairvoyant"
    }
    known = [name for name in OBJECTIVES if name in found]
    return known + sorted(found - set(known))


def label_of(name: str) -> str:
    """A figure's or a knob's name as an axis has it, with its unit."""
    if name in OBJECTIVES:
        return OBJECTIVES[name].label
    if name == "workload.rate":
        return "requests a second"
    return f"{name.removesuffix('_ms')} (ms)" if name.endswith("_ms") else name
