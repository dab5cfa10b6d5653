"""The runs under one folder, which is all that the dashboard ever reads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from experiments.records import Run, RunError, read_run

DEPTH = 4
"""How many folders below the root runs are looked for (sweeps keep theirs in folders of their own)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A run that was found.

    Attributes:
        name: its folder, relative to the root.
        kind: `real`, `sim`, `replay` or `client`; empty where it cannot be read.
        error: why it cannot be read, in one line; empty where it can.
    """

    name: str
    kind: str = ""
    error: str = ""

    @property
    def label(self) -> str:
        """For a list to choose from."""
        return f"{self.name} ({self.kind or 'unreadable'})"


def list_runs(root: Path) -> list[Entry]:
    """The runs under `root`, by name. Links are not followed out of it."""
    entries = []
    for folder, subfolders, files in os.walk(root):
        relative = Path(folder).relative_to(root)
        is_run = "run.json" in files
        subfolders[:] = [] if is_run or len(relative.parts) >= DEPTH else sorted(subfolders)
        if is_run:
            entries.append(_entry(root, relative.as_posix()))
    return sorted(entries, key=lambda entry: entry.name)


def open_run(root: Path, name: str) -> Run:
    """Open a run by its name below the root. Raises RunError where it cannot be read or lies outside."""
    folder = root / name
    _confine(root, folder)
    run = read_run(folder)
    for path in _files(folder):
        _confine(root, path)
    return run


def fingerprint(root: Path, name: str) -> tuple[tuple[str, int, int], ...]:
    """Changes whenever a file of the run does: (file, bytes, time of change in ns) of each."""
    found = []
    for path in _files(root / name):
        try:
            status = path.stat()
        except FileNotFoundError:  # a part that was joined just now
            continue
        found.append((path.name, status.st_size, status.st_mtime_ns))
    return tuple(found)


def _entry(root: Path, name: str) -> Entry:
    try:
        return Entry(name, kind=open_run(root, name).kind)
    except RunError as error:
        return Entry(name, error=str(error))


def _files(folder: Path) -> list[Path]:
    return sorted([folder / "run.json", *folder.glob("*.parquet"), *folder.glob("parts/*.parquet")])


def _confine(root: Path, path: Path) -> None:
    if not path.resolve().is_relative_to(root.resolve()):
        raise RunError(f"{path} leads out of {root}; the dashboard reads only what lies in it")
