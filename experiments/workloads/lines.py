"""Text files, plain or gzipped, as numbered lines of CSV or JSON. Everything unreadable names its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO

from experiments.workloads.errors import TraceError

LINES_A_REPORT = 2_000
on_read: ContextVar[Callable[[int], object] | None] = ContextVar("on_read", default=None)
"""Told, every so many lines, how many bytes of the file have been read: for a progress bar."""


def open_text(path: str | Path) -> TextIO:
    """Open plain or gzipped UTF-8 text, told apart by content, with line ends as they are."""
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
    except OSError as error:
        raise TraceError(path, None, f"cannot be read: {error.strerror}") from error
    binary = gzip.open(path, "rb") if zipped else open(path, "rb")  # noqa: SIM115 - the caller closes it
    return io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")  # type: ignore[arg-type]


def json_lines(path: str | Path, fraction: Callable[[str], Any] = Decimal) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSONL file. Blank lines are skipped. Fractions come as `fraction(text)`."""
    for line, text in _lines(path):
        if not text.strip():
            continue
        try:
            value = json.loads(text, parse_float=fraction, parse_constant=_refuse_constant)
        except (json.JSONDecodeError, ValueError, RecursionError) as error:
            raise TraceError(path, line, f"not JSON ({error}); expected one object a line") from error
        if not isinstance(value, dict):
            raise TraceError(path, line, f"a JSON {type(value).__name__}; expected an object")
        yield line, value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    line, tell = 0, on_read.get()
    with open_text(path) as file:
        try:
            for line, text in enumerate(file, 1):
                yield line, text
                if tell is not None and line % LINES_A_REPORT == 0:
                    tell(_position(file))
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise TraceError(path, line + 1, f"unreadable ({error}); expected UTF-8 text or gzip") from error


def _position(file: TextIO) -> int:
    """Bytes read of the file itself, compressed where it is."""
    binary: Any = file.buffer
    opened: Any = binary.fileobj if isinstance(binary, gzip.GzipFile) else binary
    return int(opened.tell())


def csv_lines(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of a CSV file, blank lines skipped; CR LF and a missing last newline are fine."""
    current = 0

    def texts() -> Iterator[str]:
        nonlocal current
        for current, text in _lines(path):  # noqa: B007 - read below
            yield text

    try:
        for cells in csv.reader(texts(), strict=True):
            if cells:
                yield current, cells
    except csv.Error as error:
        raise TraceError(path, current, f"not CSV ({error}); expected comma-separated cells") from error
