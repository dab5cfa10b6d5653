"""The result of a sweep: a row a cell, means over seeds, and comparisons of cells that differ in one variable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.fidelity.noise import half_widths
from experiments.intervals import LEVEL, Interval, interval, paired
from experiments.metrics import per_request
from experiments.records import read_run
from experiments.sweeps.cells import Sweep
from experiments.sweeps.measuring import in_window
from experiments.sweeps.spec import SweepSpec, Window


def value_text(value: Any) -> Any:
    """A varied value as a table has it: numbers as they are, a policy as `name,knob=value`, all else as JSON."""
    if isinstance(value, Mapping) and "name" in value:
        return ",".join([str(value["name"]), *(f"{knob}={of}" for knob, of in value.items() if knob != "name")])
    plain = value is None or isinstance(value, str | int | float)
    return value if plain else json.dumps(value, sort_keys=True)


def results(sweep: Sweep, notes: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row a cell, in their order: `cell`, what is varied, `seed`, `panel`, `status`, `error`, every figure, `key`.

    Nothing in it says when, where or in what order the cells were run.
    """
    rows = []
    for cell in sweep.cells:
        note = notes[cell.name]
        rows.append(
            {
                "cell": cell.name,
                **{field: value_text(value) for field, value in cell.values.items()},
                **({} if cell.seed is None else {"seed": cell.seed}),
                "panel": cell.panel,
                "status": note["status"],
                "error": note["error"],
                **(note.get("figures") or {}),
                "key": cell.key,
            }
        )
    table = pd.DataFrame(rows)
    table.insert(len(table.columns) - 1, "key", table.pop("key"))  # figures that only later rows have come before it
    for field in sweep.spec.variables.fields:
        if table[field].map(lambda value: isinstance(value, str)).any():
            table[field] = table[field].map(lambda value: None if value is None else str(value))
    return table


def write_results(table: pd.DataFrame, folder: Path) -> None:
    """results.parquet and results.csv."""
    table.to_parquet(folder / "results.parquet", index=False)
    table.to_csv(folder / "results.csv", index=False)


def means(
    table: pd.DataFrame, spec: SweepSpec, metrics: tuple[str, ...]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What is varied but the seed, and each metric's `Interval` over the seeds (None where no run has it)."""
    fields = [*spec.variables.fields, "panel"]
    found = []
    for _, rows in _groups(table[table["status"] == "ok"], fields):
        values = {field: rows[field].iloc[0] for field in fields}
        found.append((values, {metric: _interval(rows, metric) for metric in metrics}))
    return found


def _interval(rows: pd.DataFrame, metric: str) -> Interval | None:
    known = rows[metric].dropna().tolist() if metric in rows else []
    return interval(known) if known else None


def _groups(table: pd.DataFrame, fields: list[str]) -> Any:
    """Rows that are the same in these fields, in the order in which they come first."""
    if not len(fields):
        return [((), table)]
    return table.groupby(fields, sort=False, dropna=False)


@dataclass(frozen=True)
class Difference:
    """How another value of the compared variable differs from the first one.

    Attributes:
        among: what else is varied but the seed.
        value, first: of the compared variable.
        metric: the figure.
        of_first: its mean with the first value.
        by: the mean difference over the pairs; its half width is that of a paired t interval over the seeds, of a
            single pair that of a paired bootstrap over the requests (latencies alone).
    """

    among: dict[str, Any]
    value: Any
    first: Any
    metric: str
    of_first: float
    by: Interval


def differences(table: pd.DataFrame, sweep: Sweep, metrics: tuple[str, ...], cells: Path) -> list[Difference]:
    """The comparisons that a sweep asks for; of cells that have both ended well."""
    spec = sweep.spec
    if spec.compare is None:
        return []
    among = [field for field in [*spec.variables.fields, "panel"] if field not in _moving(spec)]
    values = list(dict.fromkeys(table[spec.compare].tolist()))
    found = []
    for _, rows in _groups(table[table["status"] == "ok"], among):
        here = {field: rows[field].iloc[0] for field in among}
        of = {value: rows[rows[spec.compare] == value] for value in values}
        for value in values[1:]:
            how: Any = {"on": "seed"} if "seed" in table else {"how": "cross"}
            both = of[values[0]].merge(of[value], suffixes=("_a", "_b"), **how)
            for metric in metrics:
                if f"{metric}_a" in both and len(known := both.dropna(subset=[f"{metric}_a", f"{metric}_b"])):
                    by = paired(known[f"{metric}_a"].tolist(), known[f"{metric}_b"].tolist())
                    if by.half is None:
                        names = (known["cell_a"].iloc[0], known["cell_b"].iloc[0])
                        by = Interval(by.mean, _bootstrap(names, metric, cells, spec.window), 1)
                    first = float(known[f"{metric}_a"].mean())
                    found.append(Difference(here, value, values[0], metric, first, by))
    return found


def _moving(spec: SweepSpec) -> set[str]:
    """The compared field, and those that go with it."""
    together = [set(group) for group in spec.variables.zip if spec.compare in group]
    return {str(spec.compare)}.union(*together)


def _bootstrap(names: tuple[str, str], metric: str, cells: Path, window: Window) -> float | None:
    kind, _, latency = metric.removesuffix("_ms").partition("_")
    if latency not in ("ttft", "tpot", "e2el") or not (kind == "mean" or kind[1:].replace(".", "").isdigit()):
        return None
    frames = {name: in_window(per_request(read_run(cells / name)), window) for name in names}
    return next(iter(half_widths(frames, f"{kind}_{latency}").values()))


__all__ = ["LEVEL", "Difference", "differences", "means", "results", "value_text", "write_results"]
