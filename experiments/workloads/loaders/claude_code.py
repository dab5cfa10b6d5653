"""Coding-agent sessions (kv-cache-tester): one session a line, with its model calls in `requests`.

A call has `t` (s from the session's start), `in`, `out` (tokens) and `hash_ids` (ids of the prompt's full
blocks of `block_size` tokens, local to the session; here made distinct across sessions). An entry of `type`
"subagent" holds `requests` of its own. Sessions have no common clock: all start at 0 here, so choose an
arrival process for them. `think_time` (s from the previous reply to this call, 0 where it is absent) is the gap of a
closed loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

NAME = "claude_code"


def matches(row: dict[str, Any]) -> bool:
    """Does the first row look like this format?"""
    return "requests" in row and "hash_id_scope" in row


def read(path: str | Path) -> TraceRows:
    """Read a file.

    Raises:
        TraceError: naming the line, what is wrong and what was expected.
    """
    rows = TraceRows(str(path), NAME, session=[], hash_ids=[], gap_ns=[], gap_known=[], nested=[], one_clock=False)
    numbering: dict[tuple[int, int], int] = {}  # (session, local id) -> id across sessions
    for number, (line, session) in enumerate(json_lines(path)):
        block = whole_number(rows.path, line, "block_size", json_field(rows.path, line, session, "block_size"))
        if block < 1 or rows.hash_block not in (0, block):
            raise TraceError(path, line, f"block_size is {block}; expected one size in the whole file")
        rows.hash_block = block
        for nested, call in _calls(rows.path, line, session):
            _add_call(rows, line, number, call, numbering)
            if rows.nested is not None:
                rows.nested.append(nested)
    return rows


def _calls(path: str, line: int, entry: dict[str, Any], nested: bool = False) -> list[tuple[bool, dict[str, Any]]]:
    """The model calls of a session, each with whether it is a sub-agent's."""
    listed = json_field(path, line, entry, "requests")
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise TraceError(path, line, "requests is not a list of objects; expected the calls of a session")
    calls: list[tuple[bool, dict[str, Any]]] = []
    for item in listed:
        calls += _calls(path, line, item, True) if item.get("type") == "subagent" else [(nested, item)]
    return calls


def _add_call(
    rows: TraceRows, line: int, session: int, call: dict[str, Any], numbering: dict[tuple[int, int], int]
) -> None:
    path = rows.path
    time = nanoseconds(path, line, "t", json_field(path, line, call, "t"), 1_000_000_000)
    prompt = token_count(path, line, "in", json_field(path, line, call, "in"))
    output = token_count(path, line, "out", json_field(path, line, call, "out"))
    local = block_ids(path, line, json_field(path, line, call, "hash_ids"))
    if len(local) > -(-prompt // rows.hash_block):
        expected = f"expected at most one each {rows.hash_block} tokens"
        raise TraceError(path, line, f"{len(local)} hash_ids for {prompt} tokens; {expected}")
    rows.add(line, time, prompt, output)
    if (
        rows.session is not None
        and rows.hash_ids is not None
        and rows.gap_ns is not None
        and rows.gap_known is not None
    ):
        think = call.get("think_time")
        rows.session.append(session)
        rows.gap_ns.append(max(0, nanoseconds(path, line, "think_time", think or 0, 1_000_000_000)))
        rows.gap_known.append(think is not None)
        ids = (numbering.setdefault((session, block), len(numbering)) for block in local)
        rows.hash_ids.append(tuple(ids))
