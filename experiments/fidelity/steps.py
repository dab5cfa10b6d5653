"""Step times, given the real plans: what the cost model says of the very steps that a real run took.

Two clocks are compared. The device's: how long it had each step, of those whose end the host was waiting for (else it
is not known). And the replica's: how long each step took from the end of the one before, while the replica was busy,
with the host's own work beside the device's; for that the real plans are timed by the simulator's own two clocks
(`simulator.pace.ComputedPace`), restarted whenever the real replica idled.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.records import Run
from policies.plan import Step
from policies.shapes import StepShape
from simulator.costs.base import CostModel, regime
from simulator.costs.samples import samples_from_steps
from simulator.pace import ComputedPace

Float64 = NDArray[np.float64]
_FLOOR_NS = 100_000.0
"""A step that took less counts as one that took so long: the device may have ended it before the host was done with
launching it."""


@dataclass(frozen=True, slots=True)
class StepError:
    """Errors of predicted times. Fractions of what was measured.

    Attributes:
        mean, p90: of the steps' absolute errors, each relative to its own time.
        bias: all predictions together over all measured, minus one.
        outside: share of steps with a size that was not measured.
    """

    num_steps: int
    measured_ms: float
    mean: float
    p90: float
    bias: float
    outside: float

    @classmethod
    def of(cls, predicted: Float64, measured: Float64, outside: NDArray[np.bool_]) -> StepError:
        errors = np.abs(predicted - measured) / np.maximum(measured, _FLOOR_NS)
        return cls(
            num_steps=len(measured),
            measured_ms=float(measured.mean()) / 1e6,
            mean=float(errors.mean()),
            p90=float(np.quantile(errors, 0.9)),
            bias=float(predicted.sum() / np.maximum(measured, _FLOOR_NS).sum() - 1),
            outside=float(outside.mean()),
        )


def step_errors(run: Run, costs: CostModel) -> dict[str, dict[str, Any]]:
    """Errors by clock (`device`, `step`) and kind of step: decode, prefill, mixed, each from a graph or eagerly; `all`.

    `host` has the host's two parts, prepare and finish, as means in microseconds: predicted, measured.
    """
    table = run.steps
    ran = table[(table["num_decodes"] > 0) | (table["num_chunks"] > 0)]
    shapes = [StepShape(*row) for row in ran[list(StepShape._fields)].itertuples(index=False, name=None)]
    kinds = np.array([f"{regime(shape)}, {'graph' if shape.graph else 'eager'}" for shape in shapes])
    outside = np.array([not costs.inside(shape) for shape in shapes])
    predicted = [costs.cost(shape) for shape in shapes]
    measured = ran["device_ns"].to_numpy(np.float64)
    exact = np.array(
        [s.waited for s in samples_from_steps({str(name): column.to_numpy() for name, column in table.items()})]
    )
    if not exact.any():
        exact[:] = True
    periods = busy_periods(run, costs)
    device = np.array([periods.device_ns[step] for step in ran["step"].tolist()], np.float64)
    at = np.searchsorted(ran["step"].to_numpy(), periods.steps)
    errors: dict[str, dict[str, Any]] = {
        "device": _by_kind(device[exact], measured[exact], kinds[exact], outside[exact]),
        "step": _by_kind(periods.predicted, periods.measured, kinds[at], outside[at]),
    }
    prepare = (ran["launch_ns"] - ran["plan_ns"]).to_numpy(np.float64)
    errors["host"] = {
        "prepare_us": [float(np.mean([cost.prepare_ns for cost in predicted])) / 1e3, float(prepare.mean()) / 1e3],
        **_finish(run, [cost.finish_ns for cost in predicted]),
    }
    return errors


def _by_kind(
    predicted: Float64, measured: Float64, kinds: NDArray[np.str_], outside: NDArray[np.bool_]
) -> dict[str, dict[str, float]]:
    found = {}
    for kind in [*sorted(set(kinds.tolist())), "all"]:
        chosen = np.ones(len(kinds), bool) if kind == "all" else kinds == kind
        if chosen.any():
            found[kind] = asdict(StepError.of(predicted[chosen], measured[chosen], outside[chosen]))
    return found


def _finish(run: Run, predicted: list[int]) -> dict[str, list[float]]:
    """Where the next plan was not held back: what ran meanwhile had no chunks."""
    table = run.steps
    runs = ((table["num_decodes"] > 0) | (table["num_chunks"] > 0)).to_numpy()
    ends, plans = table["end_ns"].to_numpy(), np.sort(table["plan_ns"].to_numpy())
    following = np.searchsorted(plans, ends)
    at_once = (table["num_chunks"] == 0).to_numpy()
    chosen = runs & (following < len(plans)) & at_once & np.append(at_once[1:], True)
    if not chosen.any():
        return {}
    measured = plans[following[chosen]] - ends[chosen]
    mine = np.array(predicted, np.float64)[np.cumsum(runs)[chosen] - 1]
    return {"finish_us": [float(mine.mean()) / 1e3, float(measured.mean()) / 1e3]}


class Periods(NamedTuple):
    """Of each step that began while another ran: nanoseconds from the other's end to its own, in order. `device_ns`: of
    every step by index, what it has the device for, as predicted."""

    steps: NDArray[np.int64]
    predicted: Float64
    measured: Float64
    device_ns: dict[int, int]


def busy_periods(run: Run, costs: CostModel) -> Periods:
    """The real plans, timed by the cost model."""
    limits = run.limits
    lag, lead = int(limits["lag"]), limits.get("plan_lead_ns")
    table = run.steps
    columns = [table[name].tolist() for name in ("step", "plan_ns", "end_ns")]
    shapes = [StepShape(*row) for row in table[list(StepShape._fields)].itertuples(index=False, name=None)]
    in_flight: deque[Step] = deque()
    pace, now = ComputedPace(costs, lead), 0
    last: tuple[int, int] | None = None  # the ends of the step before, predicted and measured
    found: list[tuple[int, int, int]] = []
    real_end: dict[int, int] = {}
    device_ns: dict[int, int] = {}
    for (index, plan_ns, end_ns), shape in zip(zip(*columns, strict=True), shapes, strict=True):
        if not in_flight:
            now, last = plan_ns, None
            if lag:  # it has idled; else every plan finds it so, and what the device did before still counts
                pace = ComputedPace(costs, lead)
        now = pace.plan_at(index, now) or now
        step = Step(index, now, shape=shape)
        runs = bool(shape.num_decodes or shape.num_chunks)
        if runs:
            pace.launch(step, now)
            device_ns[index] = pace.end_of(step).device_ns
            in_flight.append(step)
            real_end[index] = end_ns
        if in_flight and (len(in_flight) > lag or not runs):
            done = in_flight.popleft()
            now = max(now, pace.end_of(done).end_ns)
            pace.reported(done, now)
            measured = real_end.pop(done.index)
            if last is not None:
                found.append((done.index, now - last[0], measured - last[1]))
            last = (now, measured)
    rows = np.array([row for row in found if row[2] > 0], np.int64).reshape(-1, 3)
    return Periods(rows[:, 0], rows[:, 1].astype(np.float64), rows[:, 2].astype(np.float64), device_ns)
