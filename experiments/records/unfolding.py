"""Rows of which some stand for many (`policies.records.DecodeSteps`), as Arrow tables with all of them.

A run of steps that differ in counts is unfolded here by columns, so that a step of it never is a Python object.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from experiments.records.schema import to_table
from policies.records import GROW_BY_DECODES, GROW_BY_ONE, STEPS, DecodeSteps

Row = Sequence[object]
_NAMES = list(STEPS)
_TIMES = ("plan_ns", "launch_ns", "end_ns", "device_ns")


def steps_table(rows: Sequence[Row]) -> pa.Table:
    """Rows of steps.parquet, and such as stand for many. Raises RunError for one that does not fit."""
    firsts = to_table("steps", [row.first if type(row) is DecodeSteps else row for row in rows])
    runs = [(i, row) for i, row in enumerate(rows) if type(row) is DecodeSteps]
    if not runs:
        return firsts
    of, later = _unfolded(rows)
    table = firsts.take(pa.array(of))
    for column in GROW_BY_ONE:
        table = _set(table, _NAMES[column], _values(table, _NAMES[column]) + later)
    grown = later * _values(table, "num_decodes")
    table = _set(table, _NAMES[GROW_BY_DECODES], _values(table, _NAMES[GROW_BY_DECODES]) + grown)
    # What each step of a run has of its own.
    mine = np.isin(of, [i for i, _ in runs])
    times = _flat(chain.from_iterable(run.times) for _, run in runs).reshape(-1, len(_TIMES))
    for name, found in (*zip(_TIMES, times.T, strict=True), ("free_blocks", _flat(run.unused for _, run in runs))):
        values = _values(table, name).copy()
        values[mine] = found
        table = _set(table, name, values)
    return table


def decisions_table(rows: Sequence[Row]) -> pa.Table:
    """Rows of decisions.parquet, and such as stand for many."""
    table = to_table("decisions", [next(row.decision_rows()) if type(row) is DecodeSteps else row for row in rows])
    if all(type(row) is not DecodeSteps for row in rows):
        return table
    of, later = _unfolded(rows)
    table = table.take(pa.array(of))
    return _set(table, "step", _values(table, "step") + later)


def _unfolded(rows: Sequence[Row]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of each row of the table, which of these rows it comes from, and how many of the same come before it."""
    lengths = np.array([len(row.times) if type(row) is DecodeSteps else 1 for row in rows], np.int64)
    of = np.repeat(np.arange(len(rows)), lengths)
    return of, np.arange(len(of)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _values(table: pa.Table, name: str) -> npt.NDArray[np.int64]:
    return table.column(name).to_numpy()


def _set(table: pa.Table, name: str, values: npt.NDArray[np.int64]) -> pa.Table:
    at = table.schema.get_field_index(name)
    field = table.schema.field(at)
    return table.set_column(at, field, pa.array(values).cast(field.type))


def _flat(parts: object) -> npt.NDArray[np.int64]:
    return np.frombuffer(array("q", chain.from_iterable(parts)), np.int64)  # type: ignore[arg-type]
