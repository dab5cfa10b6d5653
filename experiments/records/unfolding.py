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
from policies.records import DecodeSteps

Row = Sequence[object]
_TIMES = ("plan_ns", "launch_ns", "end_ns", "device_ns")


def steps_table(rows: Sequence[Row]) -> pa.Table:
    """Rows of steps.parquet, and such as stand for many. Raises RunError for one that does not fit."""
    runs = [(i, row) for i, row in enumerate(rows) if type(row) is DecodeSteps]
    if not runs:
        return to_table("steps", rows)
    firsts, lengths = list(rows), np.ones(len(rows), np.int64)
    for i, run in runs:
        firsts[i], lengths[i] = run.first, len(run.times)
    of, later = _unfolded(lengths)
    table = to_table("steps", firsts).take(pa.array(of))
    decodes, tokens = _values(table, "num_decodes").astype(np.int64), _values(table, "chunk_tokens").astype(np.int64)
    one = np.ones_like(decodes)
    growth = {"step": one, "decode_clock": one, "decode_context": decodes}
    growth |= {"chunk_context": tokens, "chunk_pairs": tokens * tokens}
    for name, more in growth.items():
        table = _set(table, name, _values(table, name) + later * more)
    # What each step of a run has of its own.
    mine = np.isin(of, [i for i, _ in runs])
    times = _flat(chain.from_iterable(run.times) for _, run in runs).reshape(-1, len(_TIMES))
    own = dict(zip(_TIMES, times.T, strict=True))
    own |= {
        "free_blocks": _flat(run.unused for _, run in runs),
        "max_context": _flat(run.longest for _, run in runs),
    }
    for name, found in own.items():
        values = _values(table, name).copy()
        values[mine] = found
        table = _set(table, name, values)
    return table


def decisions_table(rows: Sequence[Row]) -> pa.Table:
    """Rows of decisions.parquet, and such as stand for many."""
    runs = [(i, row) for i, row in enumerate(rows) if type(row) is DecodeSteps]
    if not runs:
        return to_table("decisions", rows)
    firsts: list[Row] = []
    # How many steps a row stands for, and how many rows each of those has.
    steps, rows_of = np.ones(len(rows), np.int64), np.ones(len(rows), np.int64)
    done = 0
    for i, run in runs:
        group = next(run.decision_rows())
        firsts += rows[done:i]
        firsts += group
        steps[i], rows_of[i], done = len(run.times), len(group), i + 1
    table = to_table("decisions", [*firsts, *rows[done:]])
    group_of, later = _unfolded(steps * rows_of)
    began = np.cumsum(rows_of) - rows_of
    table = table.take(pa.array(began[group_of] + later % rows_of[group_of]))
    return _set(table, "step", _values(table, "step") + later // rows_of[group_of])


def _unfolded(counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of each row of the table, what it comes from, where each stands for so many, and how many of that it follows."""
    of = np.repeat(np.arange(len(counts)), counts)
    return of, np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)


def _values(table: pa.Table, name: str) -> npt.NDArray[np.int64]:
    return table.column(name).to_numpy()


def _set(table: pa.Table, name: str, values: npt.NDArray[np.int64]) -> pa.Table:
    at = table.schema.get_field_index(name)
    field = table.schema.field(at)
    return table.set_column(at, field, pa.array(values).cast(field.type))


def _flat(parts: object) -> npt.NDArray[np.int64]:
    return np.frombuffer(array("q", chain.from_iterable(parts)), np.int64)  # type: ignore[arg-type]
