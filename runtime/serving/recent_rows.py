"""The newest rows of the record in memory, beside the files if there are any."""

from __future__ import annotations

from bisect import bisect_left
from operator import itemgetter
from typing import Any

from policies.contract import Recorder
from policies.records import DECISIONS, STEPS

Row = tuple[object, ...]

_COLUMNS = {"steps": list(STEPS), "decisions": list(DECISIONS)}
_STEP = {table: columns.index("step") for table, columns in _COLUMNS.items()}


class RecentRows:
    """A recorder that keeps the newest rows of steps and decisions, and hands every row on to `behind`.

    Args:
        behind: another recorder, such as one that writes files.
        keep: rows of each table, at least; at most twice as many.
    """

    def __init__(self, behind: Recorder | None = None, keep: int = 100_000) -> None:
        self._behind = behind
        self._keep = keep
        self._rows: dict[str, list[Row]] = {table: [] for table in _COLUMNS}  # by step

    def request(self, row: Row) -> None:
        if self._behind is not None:
            self._behind.request(row)

    def step(self, row: Row) -> None:
        self._add("steps", row)
        if self._behind is not None:
            self._behind.step(row)

    def decision(self, row: Row) -> None:
        self._add("decisions", row)
        if self._behind is not None:
            self._behind.decision(row)

    def _add(self, table: str, row: Row) -> None:
        rows = self._rows[table]
        rows.append(row)
        if len(rows) >= 2 * self._keep:
            del rows[: self._keep]

    def of(self, table: str, since_step: int, limit: int) -> dict[str, Any]:
        """The first `limit` rows kept from a step on, as {"columns": names, "rows": tuples}. Raises ValueError."""
        if table not in _COLUMNS:
            raise ValueError(f"no table {table!r}; there are {', '.join(_COLUMNS)}")
        rows = self._rows[table]
        first = bisect_left(rows, since_step, key=itemgetter(_STEP[table]))
        return {"columns": _COLUMNS[table], "rows": rows[first : first + limit]}
