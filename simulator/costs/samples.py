"""Measured steps: what a fit is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from policies.records import ADDED
from policies.shapes import StepShape

_SIZES = StepShape._fields
_COLUMNS = ("plan_ns", "launch_ns", "end_ns", "device_ns", *_SIZES)


@dataclass(frozen=True, slots=True)
class StepSample:
    """One measured step: durations in nanoseconds. `finish_ns` is None where it is not known."""

    shape: StepShape
    prepare_ns: int
    device_ns: int
    finish_ns: int | None


def samples_from_steps(steps: Mapping[str, Any]) -> list[StepSample]:
    """From columns of steps.parquet, as a DataFrame or arrays by name: one sample a step that ran, in their order.

    Prepare is launch_ns - plan_ns; finish is from end_ns to the next plan of the same replica, which comes as soon as
    the host can plan again (before it idles, it makes a plan of nothing). Raises ValueError for missing columns, those
    excepted that runs of earlier versions lack.
    """
    added = ADDED["steps"]
    missing = [name for name in _COLUMNS if name not in steps and name not in added]
    if missing:
        raise ValueError(f"steps have no column {', '.join(missing)}; give the columns of steps.parquet")
    columns = {name: np.asarray(steps[name]) for name in _COLUMNS if name in steps}
    columns |= {name: np.full(len(columns["plan_ns"]), added[name]) for name in _COLUMNS if name not in steps}
    size = len(columns["plan_ns"])
    replica = np.asarray(steps["replica"]) if "replica" in steps else np.zeros(size, dtype=np.int64)
    finish = np.full(size, -1, dtype=np.int64)
    for one in np.unique(replica):
        rows = np.flatnonzero(replica == one)
        plans = np.sort(columns["plan_ns"][rows])
        following = np.searchsorted(plans, columns["end_ns"][rows])
        known = following < len(plans)
        finish[rows[known]] = plans[following[known]] - columns["end_ns"][rows[known]]
    ran = np.flatnonzero((columns["num_decodes"] > 0) | (columns["num_chunks"] > 0))
    prepare = (columns["launch_ns"] - columns["plan_ns"])[ran].tolist()
    sizes = zip(*(columns[name][ran].tolist() for name in _SIZES), strict=True)
    return [
        StepSample(StepShape(*row), before, device, None if after < 0 else after)
        for row, before, device, after in zip(
            sizes, prepare, columns["device_ns"][ran].tolist(), finish[ran].tolist(), strict=True
        )
    ]
