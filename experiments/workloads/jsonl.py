"""Our own workload file: one JSON object a line, gzipped if the name ends in `.gz`.

The first line is a header, `{"diptych_workload": 1, "name": ..., "hash_block": ..., "provenance": {...}}`;
a file written by hand may leave it out (then `name` is the file's and `hash_block` 16). Every other line is
a request:

    {"arrival_ns": 0, "prompt_tokens": 120, "output_tokens": 40, "max_tokens": 512,
     "tenant": "a", "session": 3, "turn": 0, "priority": 1,
     "declared_output": 50, "hash_ids": [0, 7], "text": "...",
     "slo": {"ttft_ns": 2000000000, "tpot_ns": null, "e2e_ns": null, "value": 1.0, "droppable": false},
     "program": 3, "parents": [0, 2], "gap_ns": 1500000000, "tool": 1}

`arrival_ns` (nanoseconds since the run began), `prompt_tokens` and `output_tokens` (the true length, hidden
from policies) are required. `max_tokens` is the client's cap; without it on any line, all get the largest
output. The rest is optional, but a field is on every line or on none. Lines may come in any order of
arrival. Blank lines are skipped.

With `parents` it is a closed loop: a request with some comes `gap_ns` after the last of them has ended. They are
numbers of requests, the first in the file being 0; each has an `arrival_ns` that is not later, and at the same time
comes first. `program` is the job that a call belongs to (without it, its session), `tool` the number of the tool that
it asks for at its end, -1 for none.
"""

from __future__ import annotations

import gzip
import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TextIO

from pydantic import ConfigDict, TypeAdapter, ValidationError

from experiments.workloads.errors import TraceError
from experiments.workloads.lines import json_lines
from experiments.workloads.request import Workload
from policies.request import Slo

VERSION = 1
ROWS_AT_ONCE = 4096
"""A column of numbers is made Python's own numbers in pieces: whole, they take ten times as much memory."""
SLO_FIELDS = tuple(field.name for field in fields(Slo))
REQUIRED = ("arrival_ns", "prompt_tokens", "output_tokens")
_INTEGERS = (
    *(*REQUIRED, "max_tokens", "session", "turn", "priority", "declared_output"),
    *("program", "gap_ns", "tool"),
)
_POSITIVE = ("prompt_tokens", "output_tokens", "max_tokens", "declared_output")
_INT64 = ("arrival_ns", "session", "program", "gap_ns")
_LEAST = {**dict.fromkeys(_POSITIVE, 1), "arrival_ns": 0, "gap_ns": 0, "tool": -1}
_OPTIONAL = (
    *("max_tokens", "tenant", "session", "turn", "priority", "declared_output", "hash_ids", "text", "slo"),
    *("program", "parents", "gap_ns", "tool"),
)
_SLO = TypeAdapter(Slo | None, config=ConfigDict(extra="forbid"))
_DEFAULT_BLOCK = 16


def write_jsonl(workload: Workload, path: str | Path) -> None:
    """Write `workload`; `read_jsonl` gives an equal one back."""
    path = Path(path)
    columns = {"text" if name == "texts" else name: getattr(workload, name) for name in _column_names(workload)}
    header = {
        "diptych_workload": VERSION,
        "name": workload.name,
        "hash_block": workload.hash_block,
        "provenance": workload.provenance,
    }
    with open_for_writing(path) as file:
        file.write(json.dumps(header, allow_nan=False) + "\n")
        for start in range(0, len(workload), ROWS_AT_ONCE):
            rows = {name: _plain(values[start : start + ROWS_AT_ONCE]) for name, values in columns.items()}
            for values in zip(*rows.values(), strict=True):
                file.write(json.dumps(dict(zip(rows, values, strict=True)), allow_nan=False) + "\n")


def open_for_writing(path: Path) -> TextIO:
    """Text, gzipped if the name ends in `.gz`."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    file: TextIO = opener(path, "wt", encoding="utf-8", newline="\n")
    return file


def _column_names(workload: Workload) -> list[str]:
    names = [*REQUIRED, *("texts" if name == "text" else name for name in _OPTIONAL)]
    return [name for name in names if getattr(workload, name) is not None]


def _plain(values: Any) -> list[Any]:
    """A piece of a column as JSON has it."""
    if not isinstance(values, list):
        return list(values.tolist())
    return [asdict(value) if isinstance(value, Slo) else value for value in values]


def read_jsonl(path: str | Path) -> Workload:
    """Read a file of this format.

    Raises:
        TraceError: a line that is not in the format.
    """
    path = Path(path)
    header: dict[str, Any] = {}
    fields: list[str] = []
    columns: dict[str, Any] = {}
    lines = array("q")
    for line, row in json_lines(path, float):
        if "diptych_workload" in row:
            if lines or header:
                raise TraceError(path, line, "a second header; only the first line may be one")
            header = _checked_header(path, line, row)
            continue
        if not lines:
            fields = [*REQUIRED, *(name for name in _OPTIONAL if name in row)]
            columns = {name: array("q") if name in _INTEGERS else [] for name in fields}
        for name, value in _checked_row(path, line, row, fields).items():
            columns[name].append(sys.intern(value) if name == "tenant" else value)
        lines.append(line)
        _check_blocks(path, line, row, header.get("hash_block", _DEFAULT_BLOCK))
    if not lines:
        raise TraceError(path, None, "has no request; expected one JSON object a line")
    if "parents" in columns:
        _check_parents(path, lines, columns["arrival_ns"], columns["parents"])
    return _build(path, header, columns)


def _checked_header(path: Path, line: int, row: dict[str, Any]) -> dict[str, Any]:
    if row["diptych_workload"] != VERSION:
        raise TraceError(path, line, f"version {row['diptych_workload']!r}; this reader knows version {VERSION}")
    wanted = {"name": str, "hash_block": int, "provenance": dict}
    for name, kind in wanted.items():
        if name in row and not isinstance(row[name], kind):
            raise TraceError(path, line, f"{name} is {row[name]!r}; expected {kind.__name__}")
    unknown = sorted(set(row) - set(wanted) - {"diptych_workload"})
    if unknown:
        raise TraceError(path, line, f"unknown header field {unknown[0]!r}; expected {', '.join(wanted)}")
    return row


def _checked_row(path: Path, line: int, row: dict[str, Any], fields: list[str]) -> dict[str, Any]:
    if set(row) != set(fields):
        missing, extra = sorted(set(fields) - set(row)), sorted(set(row) - set(fields))
        what = f"no field {missing[0]!r}" if missing else f"a field {extra[0]!r} that the first line has not"
        raise TraceError(path, line, f"{what}; expected {', '.join(fields)} on every line")
    for name in fields:
        value = row[name]
        if name in _INTEGERS:
            low, high = _limits(name)
            if type(value) is not int or not low <= value <= high:
                expected = f"expected a whole number from {low} to {high}"
                raise TraceError(path, line, f"{name} is {value!r:.40}; {expected}")
        elif name in ("hash_ids", "parents"):
            if not isinstance(value, list) or any(type(number) is not int for number in value):
                raise TraceError(path, line, f"{name} is {value!r:.60}; expected a list of whole numbers")
        elif name == "slo":
            _slo(path, line, value)
        elif not isinstance(value, str):
            raise TraceError(path, line, f"{name} is {value!r}; expected a string")
    if "max_tokens" in row and row["max_tokens"] < row["output_tokens"]:
        raise TraceError(path, line, f"max_tokens {row['max_tokens']} is below output_tokens; expected a cap")
    return row


def _slo(path: Path, line: int, value: Any) -> Slo | None:
    try:
        return _SLO.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise TraceError(
            path, line, f"slo {where}: {first['msg']}; expected null or {', '.join(SLO_FIELDS)}"
        ) from error


def _limits(name: str) -> tuple[int, int]:
    high = 2**63 - 1 if name in _INT64 else 2**31 - 1
    return _LEAST.get(name, -high - 1), high


def _check_blocks(path: Path, line: int, row: dict[str, Any], hash_block: int) -> None:
    if "hash_ids" not in row:
        return
    if hash_block < 1:
        raise TraceError(path, line, f"hash_ids, but the header's hash_block is {hash_block}; expected 1 or more")
    room = -(-row["prompt_tokens"] // hash_block)
    if len(row["hash_ids"]) > room:
        found = f"{len(row['hash_ids'])} hash_ids for {row['prompt_tokens']} tokens"
        raise TraceError(path, line, f"{found}; expected at most {room} (one each {hash_block} tokens)")


def _check_parents(path: Path, lines: Sequence[int], arrivals: Sequence[int], parents: Sequence[list[int]]) -> None:
    """Every parent stands before its children once the requests are sorted by arrival."""
    for i, of in enumerate(parents):
        for parent in of:
            known = 0 <= parent < len(arrivals)
            if not known or (arrivals[parent], parent) >= (arrivals[i], i):
                what = "no request that comes before this one" if known else "no request of this file"
                raise TraceError(path, lines[i], f"the parent {parent} is {what}; expected numbers of earlier requests")
        if len(set(of)) < len(of):
            raise TraceError(path, lines[i], "a parent is named twice; expected each once")


def _build(path: Path, header: dict[str, Any], columns: dict[str, Any]) -> Workload:
    if "text" in columns:
        columns["texts"] = columns.pop("text")
    if "slo" in columns:
        columns["slo"] = [_SLO.validate_python(value) for value in columns["slo"]]
    default_block = _DEFAULT_BLOCK if "hash_ids" in columns else 0
    return Workload.build(
        **columns,
        name=header.get("name", path.name.split(".")[0]),
        hash_block=header.get("hash_block", default_block),
        provenance=header.get("provenance", {"source": path.name}),
    )
