"""Measured steps: what a fit is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from policies.plan import NO_COPIES, CopyTimes
from policies.records import ADDED
from policies.shapes import StepShape

_SIZES = StepShape._fields
_COPIES = ("copy_out_ns", "copy_in_ns", "copy_wait_ns")
_COLUMNS = ("plan_ns", "launch_ns", "end_ns", "device_ns", *_SIZES, *_COPIES)


@dataclass(frozen=True, slots=True)
class StepSample:
    """One measured step: durations in nanoseconds. `finish_ns` is None where it is not known.

    Attributes:
        started_ns: when the device could begin it; None: not known.
        waited: whether the host was waiting for its end, which is known exactly then. A late host knows only that it
            has ended.
        serving: whether requests came as to a server, rather than in rounds that begin and end together.
        copies: how long its copies to host memory and back took.
    """

    shape: StepShape
    prepare_ns: int
    device_ns: int
    finish_ns: int | None
    started_ns: int | None = None
    waited: bool = True
    serving: bool = False
    copies: CopyTimes = NO_COPIES


def samples_from_steps(steps: Mapping[str, Any], serving_from_ns: int | None = None) -> list[StepSample]:
    """From columns of steps.parquet, as a DataFrame or arrays by name: one sample a step that ran, in their order.

    Prepare is launch_ns - plan_ns; finish is from end_ns to the next plan of the same replica, which comes as soon as
    the host can plan again (before it idles, it makes a plan of nothing). Raises ValueError for missing columns, those
    excepted that runs of earlier versions lack. `serving_from_ns`: plans from then on were for a server's requests.
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
    started, waited = _began(columns, replica, ran)
    serving = columns["plan_ns"][ran] >= (np.inf if serving_from_ns is None else serving_from_ns)
    sizes = zip(*(columns[name][ran].tolist() for name in _SIZES), strict=True)
    times = (
        columns["device_ns"][ran],
        finish[ran],
        started,
        waited,
        serving,
        *(columns[name][ran] for name in _COPIES),
    )
    return [
        StepSample(
            StepShape(*row), before, device, None if after < 0 else after, begin, exact, serves, CopyTimes(*copied)
        )
        for row, before, (device, after, begin, exact, serves, *copied) in zip(
            sizes, prepare, zip(*(column.tolist() for column in times), strict=True), strict=True
        )
    ]


def _began(columns: Mapping[str, Any], replica: Any, ran: Any) -> tuple[Any, Any]:
    """When the device could begin each step that ran: at its launch, or when the step before had ended; and whether
    the host was waiting for its end."""
    ended = np.full(len(ran), np.iinfo(np.int64).min)  # the step before
    for one in np.unique(replica):
        mine = np.flatnonzero(replica[ran] == one)
        mine = mine[np.argsort(columns["plan_ns"][ran[mine]], kind="stable")]
        ended[mine[1:]] = columns["end_ns"][ran[mine[:-1]]]
    began = np.maximum(columns["launch_ns"][ran], ended)
    return began, columns["end_ns"][ran] - began == columns["device_ns"][ran]
