"""RAGPulse (a RAG question-answering service): one JSON object a line.

`timestamp` (s, a string, not sorted), `input_length`, `output_length`, `hash_ids` (an object of lists of
chunk ids), `session_id` (text, numbered here in order of appearance). Chunks have lengths of their own,
kept in other files of that trace, so they are no blocks of one size: the chunk ids are not carried over.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from experiments.workloads.errors import TraceError
from experiments.workloads.lines import json_lines
from experiments.workloads.loaders import mooncake
from experiments.workloads.loaders.rows import TraceRows, json_field, token_count, whole_number

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


PARTS = {
    "sys_prompt": ("1_sys_prompt.jsonl.gz", "sys_prompt_id"),
    "passages_ids": ("2_passages.jsonl.gz", "passage_id"),
    "history": ("3_history.jsonl.gz", "history_id"),
    "web_search": ("5_web_search.jsonl.gz", "web_search_id"),
    "user_input": ("4_user_input.jsonl.gz", "user_input_id"),
}
"""Parts of a prompt in their order: the file of their chunks' lengths, beside the trace's, and its field of ids."""


def chunk_sharing(path: str | Path) -> dict[str, Any] | None:
    """Shares of the chunks' tokens that an endless cache would hit, in order of arrival.

    `prefix`: chunks from the first one on, as long as the same ones stood before them. `anywhere`: every chunk that
    came before, wherever it stood.
    `passages`: how many there are, how often they are used, and the shares of the uses that go to the top 1 % and 10 %.
    None where the files of the chunks' lengths are not beside the trace.

    Raises:
        TraceError: naming the line, what is wrong and what was expected.
    """
    files = {part: Path(path).with_name(name) for part, (name, _) in PARTS.items()}
    if not all(file.is_file() for file in files.values()):
        return None
    lengths = {part: _lengths(files[part], PARTS[part][1]) for part in PARTS}
    requests = [(mooncake.seconds(TraceRows(str(path), NAME), line, row), line, row) for line, row in json_lines(path)]
    seen: set[int] = set()
    seen_after: set[tuple[int, ...]] = set()
    uses: Counter[int] = Counter()
    total = anywhere = prefix = 0
    for _, line, row in sorted(requests, key=lambda entry: entry[:2]):
        chunks = [(part, chunk) for part in PARTS for chunk in row["hash_ids"].get(part, ())]
        ids = tuple(chunk for _, chunk in chunks)
        for place, (part, chunk) in enumerate(chunks, 1):
            if chunk not in lengths[part]:
                raise TraceError(path, line, f"{part} has the chunk {chunk}, of which {PARTS[part][0]} has no length")
            tokens = lengths[part][chunk]
            total += tokens
            prefix += tokens * (ids[:place] in seen_after)
            anywhere += tokens * (chunk in seen)
        seen.update(ids)
        seen_after.update(ids[:place] for place in range(1, len(ids) + 1))
        uses.update(row["hash_ids"].get("passages_ids", ()))
    by_use = sorted(uses.values(), reverse=True)
    top = {f"top_{percent}_percent": sum(by_use[: len(by_use) * percent // 100]) for percent in (1, 10)}
    return {
        "prefix": prefix / total if total else 0.0,
        "anywhere": anywhere / total if total else 0.0,
        "passages": {
            "count": len(by_use),
            "uses": sum(by_use),
            **{name: uses / max(1, sum(by_use)) for name, uses in top.items()},
        },
    }


def _lengths(path: Path, id_field: str) -> dict[int, int]:
    """Tokens of each chunk."""
    return {
        whole_number(str(path), line, id_field, json_field(str(path), line, row, id_field)): token_count(
            str(path), line, "token_length", json_field(str(path), line, row, "token_length")
        )
        for line, row in json_lines(path)
    }
