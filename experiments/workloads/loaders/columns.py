"""A CSV format as data: which column holds what. Enough for every CSV trace we know."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.workloads.errors import TraceError
from experiments.workloads.lines import csv_lines
from experiments.workloads.loaders.rows import (
    TraceRows,
    nanoseconds,
    token_count,
    whole_number,
)

Clock = Callable[[str, int, str, str], int]  # (path, line, column, cell) -> ns


def unit(unit_ns: int) -> Clock:
    """A clock that counts in units of `unit_ns` nanoseconds."""
    return lambda path, line, name, cell: nanoseconds(path, line, name, cell, unit_ns)


_NANOSECONDS = unit(1)


@dataclass(frozen=True)
class CsvFormat:
    """Column names of a CSV trace. A file is of this format if its header has all of them."""

    name: str
    prompt: str
    output: str
    time: str | None = None
    clock: Clock = _NANOSECONDS
    tenant: str | None = None
    session: str | None = None
    turn: str | None = None
    optional_session: str | None = None  # a column of text that only some releases have

    def needed(self) -> list[str]:
        """The columns that must be there."""
        named = (self.time, self.prompt, self.output, self.tenant, self.session, self.turn)
        return [name for name in named if name is not None]

    def matches(self, header: list[str]) -> bool:
        """Does a file with this header look like this format?"""
        return set(self.needed()) <= set(header)

    def read(self, path: str | Path) -> TraceRows:
        """Read a file.

        Raises:
            TraceError: naming the line, what is wrong and what was expected.
        """
        rows = TraceRows(str(path), self.name, has_arrivals=self.time is not None)
        lines = csv_lines(path)
        first = next(lines, None)
        if first is None:
            raise TraceError(path, None, f"is empty; expected a header with {', '.join(self.needed())}")
        line, header = first[0], [cell.strip() for cell in first[1]]
        missing = [name for name in self.needed() if name not in header]
        if missing:
            raise TraceError(path, line, f"no column {missing[0]!r}; expected {', '.join(self.needed())}")
        at = {name: header.index(name) for name in header}
        rows.tenant = [] if self.tenant else None
        rows.turn = array("q") if self.turn else None
        optional = self.optional_session in at
        rows.session = array("q") if self.session or optional else None
        known: dict[str, int] = {}  # session texts, numbered in order of appearance
        for line, cells in lines:
            if len(cells) != len(header):
                raise TraceError(path, line, f"{len(cells)} cells; expected {len(header)} as in the header")
            self._add(rows, line, cells, at)
            if optional and rows.session is not None:
                text = cells[at[self.optional_session or ""]]
                rows.session.append(known.setdefault(text, len(known)))
        return rows

    def _add(self, rows: TraceRows, line: int, cells: list[str], at: dict[str, int]) -> None:
        path = rows.path
        time = self.clock(path, line, self.time, cells[at[self.time]]) if self.time else 0
        prompt = token_count(path, line, self.prompt, cells[at[self.prompt]])
        output = token_count(path, line, self.output, cells[at[self.output]])
        rows.add(line, time, prompt, output)
        if rows.tenant is not None and self.tenant:
            rows.tenant.append(sys.intern(cells[at[self.tenant]]))
        if rows.session is not None and self.session:
            rows.session.append(whole_number(path, line, self.session, cells[at[self.session]]))
        if rows.turn is not None and self.turn:
            rows.turn.append(whole_number(path, line, self.turn, cells[at[self.turn]]))
