"""Reading public traces: `load(path)` finds the format by a file's header or fields.

| format | told by |
| --- | --- |
| `diptych` | JSONL with `arrival_ns` and `prompt_tokens` (or our header line) |
| `azure`, `vtc_arena`, `burstgpt`, `servegen`, `apex`, `vidur_lengths`, `sharegpt_turns` | CSV column names |
| `bailian` | JSONL with `chat_id` and `parent_chat_id` |
| `ragpulse` | JSONL whose `hash_ids` is an object |
| `claude_code` | JSONL with `requests` and `hash_id_scope` |
| `mooncake` | JSONL with `timestamp` a whole number (ms), `input_length`, `output_length`, `hash_ids` |
| `timed_trace` | the same with a fraction in the first `timestamp` (s) |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.workloads.errors import TraceError
from experiments.workloads.jsonl import read_jsonl
from experiments.workloads.lines import csv_lines, json_lines, open_text
from experiments.workloads.loaders import (
    azure,
    bailian,
    burstgpt,
    claude_code,
    lengths,
    mooncake,
    ragpulse,
    servegen,
    timed_trace,
    vtc_arena,
)
from experiments.workloads.loaders.rows import TraceRows
from experiments.workloads.request import Workload

OWN_FORMAT = "diptych"
CSV_FORMATS = {
    csv_format.name: csv_format
    for csv_format in (
        azure.FORMAT,
        vtc_arena.FORMAT,
        burstgpt.FORMAT,
        servegen.FORMAT,
        lengths.APEX,
        lengths.VIDUR,
        lengths.SHAREGPT_TURNS,
    )
}
BLOCK_FORMATS = {module.NAME: module for module in (bailian, mooncake, timed_trace)}
JSON_FORMATS = {**BLOCK_FORMATS, ragpulse.NAME: ragpulse, claude_code.NAME: claude_code}
FORMATS = (OWN_FORMAT, *CSV_FORMATS, *JSON_FORMATS)


def load(path: str | Path, format: str = "auto", *, block_size: int | None = None) -> Workload:
    """Load a trace, plain or gzipped.

    Args:
        path: the file.
        format: one of `FORMATS`, or "auto".
        block_size: tokens of a prefix block, for the Mooncake family, when the data should not decide.

    Raises:
        TraceError: `path:LINE: what is wrong and what was expected`.
        ValueError: an unknown format name.
    """
    name = detect(path) if format == "auto" else format
    return read_jsonl(path) if name == OWN_FORMAT else read_rows(path, name, block_size=block_size).to_workload()


def read_rows(path: str | Path, format: str = "auto", *, block_size: int | None = None) -> TraceRows:
    """The rows as the file has them, before anything is dropped, sorted or shifted. Errors as for `load`."""
    name = detect(path) if format == "auto" else format
    if name in CSV_FORMATS:
        return CSV_FORMATS[name].read(path)
    if name in BLOCK_FORMATS:
        return BLOCK_FORMATS[name].read(path, block_size)
    if name in JSON_FORMATS:
        return JSON_FORMATS[name].read(path)
    raise ValueError(f"unknown trace format {name!r}; expected auto or one of {', '.join(FORMATS)}")


def detect(path: str | Path) -> str:
    """The format's name, from the first line.

    Raises:
        TraceError: no known format has such a first line.
    """
    with open_text(path) as file:
        try:
            start = file.read(4096).lstrip()
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise TraceError(path, 1, f"unreadable ({error}); expected UTF-8 text or gzip") from error
    if not start:
        raise TraceError(path, None, "is empty; expected a trace")
    return _detect_json(path) if start.startswith("{") else _detect_csv(path)


def _detect_json(path: str | Path) -> str:
    line, row = next(json_lines(path))
    if "diptych_workload" in row or {"arrival_ns", "prompt_tokens"} <= set(row):
        return OWN_FORMAT
    for name, module in JSON_FORMATS.items():
        if module.matches(row):
            return name
    raise _unknown(path, line, "fields", list(row))


def _detect_csv(path: str | Path) -> str:
    line, cells = next(csv_lines(path))
    header = [cell.strip() for cell in cells]
    for name, csv_format in CSV_FORMATS.items():
        if csv_format.matches(header):
            return name
    raise _unknown(path, line, "columns", header)


def _unknown(path: str | Path, line: int, what: str, found: list[Any]) -> TraceError:
    shown = ", ".join(map(str, found))[:80]
    return TraceError(path, line, f"no known trace has the {what} {shown}; expected one of {', '.join(FORMATS)}")
