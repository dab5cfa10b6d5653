"""RAGPulse (a RAG question-answering service): one JSON object a line.

`timestamp` (s, a string, not sorted), `input_length`, `output_length`, `hash_ids` (an object of lists of
chunk ids), `session_id` (text, numbered here in order of appearance). Chunks have lengths of their own,
kept in other files of that trace, so they are no blocks of one size: the chunk ids are not carried over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.workloads.lines import json_lines
from experiments.workloads.loaders import mooncake
from experiments.workloads.loaders.rows import TraceRows, json_field, token_count

NAME = "ragpulse"


def matches(row: dict[str, Any]) -> bool:
    """Does the first row look like this format?"""
    return "input_length" in row and isinstance(row.get("hash_ids"), dict)


def read(path: str | Path) -> TraceRows:
    """Read a file.

    Raises:
        TraceError: naming the line, what is wrong and what was expected.
    """
    rows = TraceRows(str(path), NAME, session=[])
    known: dict[str, int] = {}
    for line, row in json_lines(path):
        prompt = token_count(rows.path, line, "input_length", json_field(rows.path, line, row, "input_length"))
        output = token_count(rows.path, line, "output_length", json_field(rows.path, line, row, "output_length"))
        rows.add(line, mooncake.seconds(rows, line, row), prompt, output)
        session = str(json_field(rows.path, line, row, "session_id"))
        if rows.session is not None:
            rows.session.append(known.setdefault(session, len(known)))
    return rows
