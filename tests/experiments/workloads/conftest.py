"""Where the public traces lie, and small helpers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[3]
_TRACES = Path(os.environ.get("DIPTYCH_TRACES", _ROOT.parent / "shared" / "traces"))


@pytest.fixture(scope="session")
def trace() -> Callable[[str], Path]:
    """Path of a public trace; the test is skipped where there is none."""

    def find(name: str) -> Path:
        path = _TRACES / name
        if not path.exists():
            pytest.skip(f"the public trace {name} is not here (set DIPTYCH_TRACES)")
        return path

    return find


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Write a small trace file, byte for byte."""

    def put(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return put
