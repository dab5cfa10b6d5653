"""Files beside traces: texts without token counts, prompts, and tables of chunks' lengths. Counted, not measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.workloads.lines import json_lines

TEXTS, PROMPTS, CHUNKS = "agent_texts", "prompts", "chunk_lengths"


def kind_of(row: dict[str, Any]) -> str | None:
    """Which of these a file is, by its first line; None: none."""
    if {"input", "output", "session_id"} <= set(row):
        return TEXTS
    if {"source", "turns"} <= set(row):
        return PROMPTS
    return CHUNKS if "token_length" in row and len(row) == 2 else None


def describe_other(path: str | Path) -> dict[str, Any] | None:
    """Counts of a file of one of these kinds; None for any other. Raises TraceError for lines that cannot be read."""
    rows = json_lines(path)
    first = next(rows, None)
    kind = None if first is None else kind_of(first[1])
    if first is None or kind is None:
        return None
    return {"format": kind, "counts": _counts(kind, (row for _, row in [first, *rows]))}


def _counts(kind: str, rows: Iterator[dict[str, Any]]) -> dict[str, int]:
    if kind == TEXTS:
        each = [(row["session_id"], bool(row["input"])) for row in rows]
        empty = sum(not some for _, some in each)
        return {"calls": len(each), "sessions": len({session for session, _ in each}), "empty inputs": empty}
    if kind == PROMPTS:
        sources = Counter(str(row["source"]) for row in rows)
        return {"prompts": sum(sources.values()), **dict(sources.most_common())}
    lengths = [int(row["token_length"]) for row in rows]
    return {"chunks": len(lengths), "tokens": sum(lengths)}
