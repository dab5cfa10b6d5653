"""vLLM's `timed_trace` dataset: Mooncake's fields with `timestamp` in seconds and blocks of 16 tokens by
default."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

from experiments.workloads.lines import json_lines
from experiments.workloads.loaders import mooncake
from experiments.workloads.loaders.rows import TraceRows

NAME = "timed_trace"
DEFAULT_BLOCK = 16
_FIELDS = {"timestamp", "input_length", "output_length", "hash_ids"}


def matches(row: dict[str, Any]) -> bool:
    """Does the first row look like this format? A timestamp with a fraction is taken for seconds."""
    return set(row) >= _FIELDS and isinstance(row["hash_ids"], list) and isinstance(row["timestamp"], Decimal)


def read(path: str | Path, block: int | None = None) -> TraceRows:
    """Read a file.

    Raises:
        TraceError: naming the line, what is wrong and what was expected.
    """
    rows = TraceRows(str(path), NAME, hash_ids=[])
    for line, row in json_lines(path):
        mooncake.add_row(rows, line, row, mooncake.seconds(rows, line, row))
    rows.hash_block = mooncake.find_block(rows, block, DEFAULT_BLOCK)
    return rows
