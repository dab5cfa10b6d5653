"""A sweep's result as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.compare import format_figure
from experiments.intervals import LEVEL, Interval
from experiments.sweeps.cells import Sweep
from experiments.sweeps.table import differences, means

_DASH = "–"


def markdown(sweep: Sweep, table: pd.DataFrame, cells: Path) -> str:
    """What was run and how it was measured, the cells, means over seeds and comparisons."""
    return "\n".join(_lines(sweep, table, cells)) + "\n"


def known_metrics(sweep: Sweep, table: pd.DataFrame) -> tuple[str, ...]:
    """The figures of the summary that some run has."""
    return tuple(metric for metric in sweep.spec.shown if metric in table and table[metric].notna().any())


def _lines(sweep: Sweep, table: pd.DataFrame, cells: Path) -> Iterator[str]:
    spec, metrics = sweep.spec, known_metrics(sweep, table)
    failed = int((table["status"] != "ok").sum())
    both = table["panel"].nunique() > 1
    yield f"# {len(table)} cells" + (f", {failed} of which failed" if failed else "")
    yield ""
    yield f"Measured: {spec.window}."
    if spec.slo:
        limits = ", ".join(f"{name} {ms:,g} ms" for name, ms in spec.slo.items())
        yield f"Goodput: requests a second that completed within {limits}."
    if "clairvoyant" in table and (marked := table["clairvoyant"].fillna(False).astype(bool)).any():
        yield f"In {int(marked.sum())} cells a policy is told the true output lengths (clairvoyant)."
    yield ""
    fields = [*spec.variables.fields, *(["seed"] if "seed" in table else []), *(["panel"] if both else [])]
    rows = []
    for row in table.to_dict("records"):
        figures = [_figure(row.get(metric)) for metric in metrics]
        rows.append(
            [*(_value(row[field]) for field in fields), *figures, "" if row["status"] == "ok" else row["error"]]
        )
    yield from _table([*fields, *metrics, *(["failed"] if failed else [])], rows if failed else [r[:-1] for r in rows])
    if "seed" in table and table["seed"].nunique() > 1:
        yield ""
        yield f"## Means over seeds, with {LEVEL:.0%} confidence intervals (Student's t)"
        yield ""
        fields = [*spec.variables.fields, *(["panel"] if both else [])]
        rows = [
            [*(_value(values[field]) for field in fields), *(_mean(intervals[metric]) for metric in metrics)]
            for values, intervals in means(table, spec, metrics)
        ]
        yield from _table([*fields, *metrics], rows)
    if spec.compare is not None:
        yield from _comparisons(sweep, table, metrics, cells, both)


def _comparisons(sweep: Sweep, table: pd.DataFrame, metrics: tuple[str, ...], cells: Path, both: bool) -> Iterator[str]:
    found = differences(table, sweep, metrics, cells)
    seeds = "seed" in table and table["seed"].nunique() > 1
    how = "paired over the seeds (Student's t)" if seeds else "a paired bootstrap over the requests (latencies alone)"
    yield ""
    yield f"## {sweep.spec.compare}: differences on the same arrivals, {LEVEL:.0%} intervals by {how}"
    yield ""
    yield "A star: 0 is outside of the interval."
    yield ""
    rows = []
    for one in found:
        among = ", ".join(f"{field}={_value(value)}" for field, value in one.among.items() if field != "panel" or both)
        relative = f"{one.by.mean / one.of_first:+.1%}" if one.of_first else _DASH
        star = " \\*" if one.by.apart_from_zero else ""
        rows.append([among, f"{_value(one.value)} - {_value(one.first)}", one.metric, _mean(one.by) + star, relative])
    yield from _table(["among", "difference", "figure", "by", "relative"], rows)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield "|" + " --- |" * len(titles)
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |"


def _value(value: Any) -> str:
    missing = value is None or (isinstance(value, float) and pd.isna(value))
    return _DASH if missing else f"{value:g}" if isinstance(value, float) else str(value)


def _figure(value: Any) -> str:
    return _DASH if value is None or pd.isna(value) else format_figure(float(value))


def _mean(found: Interval | None) -> str:
    if found is None:
        return _DASH
    text = ("-" if found.mean < 0 else "") + format_figure(abs(found.mean))
    half = None if found.half is None else 0.0 if found.half < 1e-9 * abs(found.mean) else found.half  # rounding
    return text if half is None else f"{text} ± {format_figure(half)}"
