"""Runs written row by row, for examples that can be computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.records import TABLES, Run, RunWriter, read_run
from tests.experiments.fake_run import fake_info

_EMPTY = {"string": "", "bool": False, "list<int64>": [], "list<binary>": [], "map<string,float64>": []}


def row(table: str, **values: Any) -> tuple[object, ...]:
    """A row with the given values; the others are zero, empty or null."""
    assert values.keys() <= TABLES[table].keys()
    defaults = {name: None if kind.endswith("?") else _EMPTY.get(kind, 0) for name, kind in TABLES[table].items()}
    return tuple({**defaults, **values}.values())


def write_run(
    folder: Path,
    requests: list[dict[str, Any]],
    steps: list[dict[str, Any]],
    decisions: list[dict[str, Any]] | None = None,
    **info: Any,
) -> Run:
    """A run of these rows."""
    with RunWriter(folder, {**fake_info(), **info}, flush_seconds=None) as writer:
        for values in requests:
            writer.request(row("requests", **values))
        for values in steps:
            writer.step(row("steps", **values))
        for values in decisions or []:
            writer.decision(row("decisions", **values))
    return read_run(folder)
