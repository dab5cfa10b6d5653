"""A replay, held to the run that it replays."""

from __future__ import annotations

from pathlib import Path

from experiments.divergence import diff_decisions
from experiments.records import Run, read_run
from experiments.replaying import replay_run


def check_replay(run: Run, folder: Path) -> None:
    """Replay a run into a folder: every decision and every row of its steps comes out the same."""
    replay_run(run, folder, check=True)
    replayed = read_run(folder)
    assert diff_decisions(run, replayed) is None
    assert run.steps.equals(replayed.steps)
