"""The newest rows of the record in memory, beside the files if there are any."""

from __future__ import annotations

from collections import deque
from itertools import islice
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
        keep: rows of each table.
    """

    def __init__(self, behind: Recorder | None = None, keep: int = 100_000) -> None:
        self._behind = behind
        self._rows: dict[str, deque[Row]] = {table: deque(maxlen=keep) for table in _COLUMNS}

    def request(self, row: Row) -> None:
        if self._behind is not None:
            self._behind.request(row)

    def step(self, row: Row) -> None:
        self._rows["steps"].append(row)
        if self._behind is not None:
            self._behind.step(row)

    def decision(self, row: Row) -> None:
        self._rows["decisions"].append(row)
        if self._behind is not None:
            self._behind.decision(row)

    def of(self, table: str, since_step: int, limit: int) -> dict[str, Any]:
        """The first `limit` rows kept from a step on, as {"columns": names, "rows": lists}. Raises ValueError."""
        if table not in _COLUMNS:
            raise ValueError(f"no table {table!r}; there are {', '.join(_COLUMNS)}")
        at = _STEP[table]
        found = (list(row) for row in self._rows[table] if row[at] >= since_step)  # type: ignore[operator]
        return {"columns": _COLUMNS[table], "rows": list(islice(found, limit))}
