"""One `diptych` command, as a test runs it, and flags for small ones."""

from __future__ import annotations

import sys

import pytest

from experiments import cli

SIMULATE = ["simulate", "-w", "chat", "-n", "60", "--rate", "8"]
TINY = ["--model", "tiny", "--set", "model.load_format=dummy", "--set", "limits.num_blocks=64"]
TINY += ["--set", "limits.max_model_len=128", "--set", "workload.length_scale=0.02"]


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
