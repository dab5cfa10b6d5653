"""Ctrl-C in the middle of a command: what it says, and what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from experiments.cli.options import interruptible
from experiments.records import RunWriter, read_run
from tests.experiments.command import SIMULATE, TINY, diptych
from tests.experiments.fake_run import fake_info, fake_run

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.mark.parametrize("command", ["run", "simulate"])
def test_ctrl_c_leaves_a_readable_record_and_no_process_behind(command: str) -> None:
    sizes = ["--set", "workload.prompt_tokens=20", "--set", "workload.output_tokens=100"]
    long = {
        # Longer than the pauses between them, so that some are always being served.
        "run": ["run", "-w", "fixed", "-n", "5000", "--rate", "50", *TINY[:-2], *sizes],
        "simulate": ["simulate", "-w", "chat", "-n", "200000", "--rate", "8"],
    }
    process = subprocess.Popen(
        [sys.executable, "-c", "from experiments.cli import main; main()", *long[command], "-o", "cut"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(Path("cut/parts").glob("requests-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; what was recorded until then is in cut" in err
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    run = read_run("cut")
    assert not run.complete
    statuses = set(run.requests["status"])
    assert "unfinished" in statuses
    assert statuses & {"stop", "length"}
    assert len(run.steps) > 10


@pytest.mark.parametrize("where", ["experiments.cli._run", "experiments.cli.running.make_workload"])
def test_ctrl_c_before_anything_is_recorded_says_just_that(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    assert diptych(monkeypatch, capsys, *SIMULATE) == (130, "", "diptych: interrupted\n")


@pytest.mark.parametrize(
    ("earlier", "recorded", "text"),
    [
        (False, False, "nothing was recorded yet"),
        (False, True, "what was recorded until then is in run"),
        (True, False, "nothing was recorded yet"),
        (True, True, "what was recorded until then is in run"),
    ],
)
def test_ctrl_c_says_where_the_record_is_only_if_this_run_has_one(
    earlier: bool, recorded: bool, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        if recorded:
            RunWriter("run", fake_info(), overwrite=True).abort()
        raise KeyboardInterrupt

    if earlier:
        fake_run(Path("run"))
    with pytest.raises(typer.Exit), interruptible(Path("run")):
        interrupt()
    assert capsys.readouterr().err == f"diptych: interrupted; {text}\n"
