"""Runs of one specification, and how far they are apart: differences below that say nothing."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.compare import compare
from experiments.records import Run

_SAME = ("kind", "spec", "limits", "cost", "hardware")
"""Entries of run.json that two runs of one experiment have in common."""


def is_repeat(run: Run, other: Run) -> bool:
    """Whether another run is the same experiment once more: same panel, specification, limits and machine."""
    return run.folder.resolve() != other.folder.resolve() and all(
        run.info.get(entry) == other.info.get(entry) for entry in _SAME
    )


def noise_floor(run: Run, repeats: Sequence[Run]) -> dict[str, float]:
    """The largest relative difference that any repeat has from the run, by the metrics of `Comparison.figures`.

    Raises RunError for records that cannot be read.
    """
    floor: dict[str, float] = {}
    for repeat in repeats:
        for metric, _, pair in compare(run, repeat, decisions=False).figures():
            if pair.error is not None:
                floor[metric] = max(floor.get(metric, 0.0), abs(pair.error))
    return floor
