"""Rows on their way to Arrow, among them such as stand for many (`policies.records.DecodeSteps`).

A run of steps that differ in counts is unfolded here by columns, so that a step of it never is a Python object.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from struct import error as StructError
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from experiments.records.schema import SCHEMAS, RunError, to_table
from policies.records import STEPS, DecodeSteps

Row = Sequence[object]
_TIMES = ("plan_ns", "launch_ns", "end_ns", "device_ns")
_WAKE = "wake_ns"  # the one column of steps.parquet that may be null
_WAKE_AT = list(STEPS).index(_WAKE)
_pack = Struct(f"{_WAKE_AT}q?{len(STEPS) - _WAKE_AT - 1}q").pack  # `wake_ns` is kept apart, as it may be None
_pack_times = Struct(f"{len(_TIMES)}q").pack


class StepRows:
    """Rows of steps.parquet that wait to be written, as numbers in memory: no objects that would have to be kept."""

    def __init__(self) -> None:
        self.num_rows = 0  # with all those that runs stand for
        self._rows = bytearray()
        self._wakes: list[object] = []
        self._runs: list[int] = []  # which of the rows are the first of a run
        self._lengths: list[int] = []  # of the runs
        self._longest: list[int] = []
        self._times = bytearray()  # of each step of the runs
        self._unused: list[int] = []

    def add(self, row: Row) -> None:
        """A row. Raises RunError where it does not fit."""
        try:
            self._rows += _pack(*row)
        except StructError as error:
            to_table("steps", [row])  # which says what is wrong
            raise RunError(f"a row of steps has a value that is no whole number: {error}") from error
        self._wakes.append(row[_WAKE_AT])
        self.num_rows += 1

    def add_run(self, steps: DecodeSteps) -> None:
        """A row for each of these steps."""
        self.add(steps.first)
        self._runs.append(len(self._wakes) - 1)
        self._lengths.append(len(steps.times))
        self._longest.append(steps.longest)
        for times in steps.times:
            self._times += _pack_times(*times)
        self._unused += steps.unused
        self.num_rows += len(steps.times) - 1

    def table(self) -> pa.Table:
        """All of them. Raises RunError where a value does not fit its column."""
        numbers = np.ascontiguousarray(np.frombuffer(self._rows, np.int64).reshape(-1, len(STEPS)).T)
        try:
            wakes = pa.array(self._wakes, SCHEMAS["steps"].field(_WAKE).type)
        except (pa.ArrowException, OverflowError, TypeError) as error:
            raise RunError(f"a value of steps.{_WAKE} is no int64: {error}") from error
        if self._runs:
            lengths = np.ones(len(self._wakes), np.int64)
            lengths[self._runs] = self._lengths
            of, later = _unfolded(lengths)
            numbers, wakes = numbers[:, of], wakes.take(pa.array(of))
            self._fill_in(dict(zip(STEPS, numbers, strict=True)), later, np.isin(of, self._runs))
        columns = []
        for field, values in zip(SCHEMAS["steps"], numbers, strict=True):
            try:
                columns.append(wakes if field.name == _WAKE else pa.array(values).cast(field.type))
            except pa.ArrowException as error:
                raise RunError(f"a value of steps.{field.name} is no {field.type}: {error}") from error
        return pa.Table.from_arrays(columns, schema=SCHEMAS["steps"])

    def _fill_in(
        self, columns: dict[str, npt.NDArray[np.int64]], later: npt.NDArray[np.int64], mine: npt.NDArray[np.bool_]
    ) -> None:
        """The columns have a run's first row for each of its steps: make of it what `DecodeSteps` says.

        `later`: how many steps of its run come before a row. `mine`: the rows that are of runs."""
        decodes, tokens = columns["num_decodes"], columns["chunk_tokens"]
        columns["step"] += later
        columns["decode_clock"] += later
        columns["decode_context"] += later * decodes
        columns["chunk_context"] += later * tokens
        columns["chunk_pairs"] += later * tokens * tokens
        longest = np.repeat(self._longest, self._lengths) + later[mine]
        columns["max_context"][mine] = np.maximum(longest, columns["chunk_context"][mine])
        columns["free_blocks"][mine] = self._unused
        for name, times in zip(_TIMES, np.frombuffer(self._times, np.int64).reshape(-1, len(_TIMES)).T, strict=True):
            columns[name][mine] = times


class Repeated(NamedTuple):
    """Rows of decisions.parquet of one step, and in how many steps in a row the same was decided."""

    rows: Sequence[Row]
    steps: int


def decisions_table(rows: Sequence[Row | Repeated]) -> pa.Table:
    """Rows of decisions.parquet, and such as stand for many. Raises RunError for one that does not fit."""
    runs = [(i, row) for i, row in enumerate(rows) if type(row) is Repeated]
    if not runs:
        return to_table("decisions", rows)
    firsts: list[Row] = []
    # How many steps a row stands for, and how many rows each of those has.
    steps, rows_of = np.ones(len(rows), np.int64), np.ones(len(rows), np.int64)
    done = 0
    for i, run in runs:
        firsts += rows[done:i]
        firsts += run.rows
        steps[i], rows_of[i], done = run.steps, len(run.rows), i + 1
    table = to_table("decisions", [*firsts, *rows[done:]])
    group_of, later = _unfolded(steps * rows_of)
    began = np.cumsum(rows_of) - rows_of
    table = table.take(pa.array(began[group_of] + later % rows_of[group_of]))
    at = table.schema.get_field_index("step")
    values = table.column(at).to_numpy() + later // rows_of[group_of]
    return table.set_column(at, table.schema.field(at), pa.array(values))


def _unfolded(counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of each row of the table, what it comes from, where each stands for so many, and how many of that it follows."""
    of = np.repeat(np.arange(len(counts)), counts)
    return of, np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
