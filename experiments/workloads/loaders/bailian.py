"""Qwen Bailian traces ("KVCache in the wild", ATC 2025): one JSON object a line.

`chat_id`, `parent_chat_id` (-1: none), `timestamp` (s), `input_length`, `output_length`, `type`, `turn`
(from 1), `hash_ids` (16-token blocks, prefix-chained). A session is a tree of chats; its number is the
`chat_id` of its root, or of the oldest ancestor that the file holds. Turns are counted from 0 here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.workloads.errors import TraceError
from experiments.workloads.lines import json_lines
from experiments.workloads.loaders import mooncake
from experiments.workloads.loaders.rows import TraceRows, json_field, whole_number

NAME = "bailian"
DEFAULT_BLOCK = 16


def matches(row: dict[str, Any]) -> bool:
    """Does the first row look like this format?"""
    return "chat_id" in row and "parent_chat_id" in row


def read(path: str | Path, block: int | None = None) -> TraceRows:
    """Read a file.

    Raises:
        TraceError: naming the line, what is wrong and what was expected.
    """
    rows = TraceRows(str(path), NAME, hash_ids=[], turn=[])
    chats: list[int] = []
    parent: dict[int, int] = {}
    for line, row in json_lines(path):
        numbers = {
            name: whole_number(rows.path, line, name, json_field(rows.path, line, row, name))
            for name in ("chat_id", "parent_chat_id", "turn")
        }
        if numbers["turn"] < 1:
            raise TraceError(path, line, f"turn is {numbers['turn']}; expected 1 for the first")
        if numbers["chat_id"] in parent:
            raise TraceError(path, line, f"chat_id {numbers['chat_id']} a second time; expected it to be unique")
        mooncake.add_row(rows, line, row, mooncake.seconds(rows, line, row))
        if rows.turn is not None:
            rows.turn.append(numbers["turn"] - 1)
        chats.append(numbers["chat_id"])
        parent[numbers["chat_id"]] = numbers["parent_chat_id"]
    rows.session = _roots(chats, parent)
    rows.hash_block = mooncake.find_block(rows, block, DEFAULT_BLOCK)
    return rows


def _roots(chats: list[int], parent: dict[int, int]) -> list[int]:
    """The oldest known ancestor of each chat. A loop, which no real file has, ends where it began."""
    root: dict[int, int] = {}
    for chat in chats:
        path, on_path = [chat], {chat}
        while path[-1] not in root and parent[path[-1]] in parent and parent[path[-1]] not in on_path:
            path.append(parent[path[-1]])
            on_path.add(path[-1])
        found = root.get(path[-1], path[-1])
        root.update(dict.fromkeys(path, found))
    return [root[chat] for chat in chats]
