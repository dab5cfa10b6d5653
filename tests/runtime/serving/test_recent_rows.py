"""The newest rows of the record, as an operator asks for them."""

from __future__ import annotations

import pytest

from policies.records import DECISIONS
from runtime.serving.recent_rows import RecentRows

COLUMNS = list(DECISIONS)


def row(step: int, tokens: int) -> tuple[object, ...]:
    values = {"step": step, "tokens": tokens}
    return tuple(values.get(name, 0) for name in COLUMNS)


def test_rows_are_found_from_a_step_on_and_the_oldest_are_let_go() -> None:
    rows = RecentRows(keep=10)
    for i in range(35):
        rows.decision(row(i // 2, i))
    tokens = COLUMNS.index("tokens")

    def found(since: int, limit: int) -> list[object]:
        return [one[tokens] for one in rows.of("decisions", since, limit)["rows"]]

    assert found(16, 3) == [32, 33, 34]
    assert found(15, 3) == [30, 31, 32]
    assert found(99, 3) == []
    kept = found(0, 100)
    assert kept == list(range(35 - len(kept), 35))
    assert 10 <= len(kept) < 20
    with pytest.raises(ValueError, match="no table 'nothing'"):
        rows.of("nothing", 0, 1)
