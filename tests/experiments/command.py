"""One `diptych` command, as a test runs it."""

from __future__ import annotations

import sys

import pytest

from experiments import cli


def diptych(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command, in this process."""
    monkeypatch.setattr(sys, "argv", ["diptych", *args])
    status = 0
    try:
        cli.main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err
