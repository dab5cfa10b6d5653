"""What a workload's capacity run says, and on which card a run was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.fidelity.matrix import POLICIES, Cell
from experiments.records import Run, read_run
from experiments.timeline import timeline

FEWEST_ENDS = 40
"""Fewer requests that ended while somebody waited say nothing of capacity."""


def capacity(folder: Path, work: str) -> float | None:
    """Requests a second that a workload's capacity run ended while somebody waited; None where there is none."""
    path = folder / "runs" / Cell(work, None, next(iter(POLICIES))).name
    return saturated(read_run(path)) if (path / "run.json").exists() else None


def saturated(run: Run) -> float:
    """Sustained capacity: requests a second that ended while somebody waited, after as many had ended as ran at once.

    Before that the replica fills, and its requests are younger than in the long run; but no more than half of the ends
    are left out. Of a run in which hardly anybody waited, of all requests.
    """
    states, ends = timeline(run), np.sort(run.requests["finish_ns"].dropna().to_numpy(np.int64))
    waiting = states["t_ns"][states["waiting"] > 0]
    until = int(waiting.iloc[-1]) if len(waiting) else 0
    ended = ends[ends <= until]
    if len(ended) < FEWEST_ENDS:
        ended = ends
    first = min(int(states["running"].max()), len(ended) // 2)
    return (len(ended) - 1 - first) / (int(ended[-1] - ended[first]) / 1e9)


def card(hardware: Mapping[str, Any]) -> str:
    """A short name of the device that a run's record describes: figures of two cards are not mixed."""
    gpus = hardware.get("gpus") or []
    return str(gpus[0].get("card") or gpus[0]["name"]).replace(" ", "-")[:12] if gpus else "cpu"
