"""The page of oracles names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "oracles.md").read_text()
COUNTS = {"A": 4, "B": 6, "C": 4, "D": 3, "E": 2, "F": 4, "G": 4, "H": 3, "I": 6, "J": 1}


def test_every_test_that_is_named_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) == PAGE.count("::") > 60
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file} has no {name}"


def test_every_row_names_a_test_and_no_oracle_is_left_out() -> None:
    rows = [row for row in PAGE.splitlines() if row.startswith("|") and "---" not in row]
    for row in rows:
        assert "::" in row or "| test" in row, row
    oracles = {row[2:4] for row in rows if re.match(r"\| [A-J]\d [ESQ]", row)}
    assert oracles == {f"{letter}{i}" for letter, count in COUNTS.items() for i in range(1, count + 1)}
