"""What goes wrong with a trace file."""

from __future__ import annotations

from pathlib import Path


class TraceError(ValueError):
    """A trace file cannot be used. The message is `path:LINE: what is wrong and what was expected`."""

    def __init__(self, path: str | Path, line: int | None, message: str) -> None:
        self.path, self.line = str(path), line
        super().__init__(f"{path}: {message}" if line is None else f"{path}:{line}: {message}")
