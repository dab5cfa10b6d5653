"""Mooncake traces (FAST 2025): one JSON object a line.

`timestamp` (whole milliseconds from the start), `input_length`, `output_length` (tokens), `hash_ids` (one
id for each block of the prompt, the last may be partial; equal id means equal block and equal prefix before
it), and in traces of agents `session_id` (a whole number). Blocks have 512 tokens in the original; derived
files use others, so the block is found from the data: the size for which every row has exactly
`ceil(input_length / block)` ids.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np

from experiments.workloads.errors import TraceError
from experiments.workloads.lines import json_lines
from experiments.workloads.loaders.rows import (
    TraceRows,
    block_ids,
    json_field,
    nanoseconds,
    token_count,
    whole_number,
)

NAME = "mooncake"
DEFAULT_BLOCK = 512
_BLOCKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 8, 4, 2, 1)
_FIELDS = {"timestamp", "input_length", "output_length", "hash_ids"}


def matches(row: dict[str, Any]) -> bool:
    """Does the first row look like this format? Whole timestamps are taken for milliseconds."""
    return set(row) >= _FIELDS and isinstance(row["hash_ids"], list) and type(row["timestamp"]) is int


def read(path: str | Path, block: int | None = None) -> TraceRows:
    """Read a file. `block` is the tokens of a block, when the data should not decide.

    Raises:
        TraceError: naming the line, what is wrong and what was expected.
    """
    rows = TraceRows(str(path), NAME, hash_ids=[])
    for line, row in json_lines(path):
        time = json_field(rows.path, line, row, "timestamp")
        if type(time) is not int:
            hint = "expected whole milliseconds; for seconds name the format 'timed_trace'"
            raise TraceError(path, line, f"timestamp is {str(time)!r:.40}; {hint}")
        add_row(rows, line, row, time * 1_000_000)
    rows.hash_block = find_block(rows, block, DEFAULT_BLOCK)
    return rows


def add_row(rows: TraceRows, line: int, row: dict[str, Any], arrival_ns: int) -> None:
    """Append the fields that the Mooncake family shares."""
    path = rows.path
    prompt = token_count(path, line, "input_length", json_field(path, line, row, "input_length"))
    output = token_count(path, line, "output_length", json_field(path, line, row, "output_length"))
    ids = block_ids(path, line, json_field(path, line, row, "hash_ids"))
    rows.add(line, arrival_ns, prompt, output)
    if rows.hash_ids is not None:
        rows.hash_ids.append(ids)
    if "session_id" in row and len(rows.line) == 1:
        rows.session = array("q")
    if rows.session is not None:
        session = json_field(path, line, row, "session_id")
        rows.session.append(whole_number(path, line, "session_id", session))


def find_block(rows: TraceRows, block: int | None, default: int) -> int:
    """The block size that explains the number of ids of every row.

    That is `block` if given, else `default` if it fits, else the smallest power of two that does (from 16 on first).
    """
    prompts = np.array(rows.prompt_tokens, np.int64)
    counts = np.array([len(ids) for ids in rows.hash_ids or []], np.int64)
    for size in (block,) if block else (default, *_BLOCKS):
        if size and np.array_equal(counts, -(-prompts // size)):
            return size
    wanted = block or default
    bad = int(np.argmax(counts != -(-prompts // wanted)))
    raise TraceError(
        rows.path,
        rows.line[bad],
        f"{counts[bad]} hash_ids for {prompts[bad]} tokens; expected {-(-prompts[bad] // wanted)} "
        f"(one each {wanted} tokens)" + ("" if block else ", or one other block size that fits every line"),
    )


def seconds(rows: TraceRows, line: int, row: dict[str, Any]) -> int:
    """The `timestamp` field in seconds, as nanoseconds."""
    time = json_field(rows.path, line, row, "timestamp")
    return nanoseconds(rows.path, line, "timestamp", time, 1_000_000_000)
