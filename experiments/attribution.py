"""Where the difference between a real run and its simulation comes from: which term of the cost model, or queueing.

Given the real plans, every step's time is predicted, and its error split: the host's part is in the time that the
device waited; the device's error is ascribed to the terms of the cost model by least squares, as a price of each that
is some percents too high or low; what no price explains is `other`. A request's latency, given the plans, is off by
what the steps are off that ran from its arrival to its end. What the free-running simulation is off beyond that is
`queueing`: other plans, since requests met others in the queue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.compare import TITLES
from experiments.fidelity.steps import busy_periods
from experiments.metrics import COLUMNS, per_request
from experiments.records import Run
from experiments.replaying import COMPLETED
from experiments.simulated import costs_as_described
from policies.shapes import StepShape
from simulator.costs.base import regime
from simulator.costs.fitted import FittedCost
from simulator.costs.samples import samples_from_steps

Float64 = NDArray[np.float64]
QUEUEING = "queueing"
TERMS = ("host", "products", "attention", "sampling", "copies", "clocks", "other")
"""Of a step's time. `clocks`: the slowdown under load."""
DEVICE_TERMS = TERMS[1:-1]
WORST = 5
_RIDGE = 0.02
"""How reluctantly a price is said to be off: as if so large a share of the steps, once more, were exact."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Steps of one kind: their share of the busy time, and by how much of that all predictions together are off."""

    kind: str
    steps: int
    share: float
    bias: float


@dataclass(frozen=True, slots=True)
class WorstStep:
    """Milliseconds from the end of the step before to its own, and the term that is off most."""

    step: int
    kind: str
    real_ms: float
    predicted_ms: float
    term: str


@dataclass(frozen=True, slots=True)
class WorstRequest:
    """E2E in milliseconds, the steps that it lived through in the real run, the one of them that is off most, and what
    of the error is not queueing."""

    request_id: int
    real_ms: float
    simulated_ms: float
    steps: tuple[int, int]
    worst_step: int
    given_plans_ms: float


@dataclass(frozen=True, slots=True)
class Attribution:
    """What `attribute` found.

    Attributes:
        busy: share of the real run's time in which steps ran one after another: what the terms are shares of.
        terms: term -> predicted minus measured, given the real plans, as a share of the busy time.
        latencies: `ttft`, `tpot`, `e2el` -> term or `queueing` -> milliseconds that the simulated mean is off for it;
            `real` has the real mean. The terms and queueing sum to the whole error.
        capacity: limits that are not alike, as text, and preemptions of both.
    """

    busy: float
    terms: dict[str, float]
    kinds: list[Kind]
    latencies: dict[str, dict[str, float]]
    different_limits: list[str]
    preemptions: tuple[int, int]
    steps: list[WorstStep]
    requests: list[WorstRequest]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def rows(self) -> list[list[str]]:
        """A line a latency, in the order of `heads`: its name, then percents of the real mean."""
        return [
            [TITLES[latency], *(f"{self.shares(latency)[name]:+.1%}" for name in self.heads()[1:])]
            for latency in self.latencies
        ]

    def heads(self) -> list[str]:
        """Of the columns of `rows`: the whole error is that of the mean."""
        return ["mean", "error", *self.terms, QUEUEING]

    def notes(self) -> list[str]:
        """What is to be said below: where the steps' error is, capacity, the worst steps and requests."""
        kinds = ", ".join(f"{k.kind} {k.share:.0%} of the time, {k.bias:+.2%}" for k in self.kinds if k.steps)
        limits = f"limits differ in {', '.join(self.different_limits)}" if self.different_limits else "limits are alike"
        lines = [
            f"steps, given the real plans: {kinds}",
            f"capacity: {limits}; {self.preemptions[0]} and {self.preemptions[1]} preemptions",
        ]
        lines += [
            f"step {s.step} ({s.kind}): {s.real_ms:.2f} ms, predicted {s.predicted_ms:.2f}; mostly {s.term}"
            for s in self.steps
        ]
        lines += [
            f"request {r.request_id}, E2E {r.real_ms:,.0f} ms, simulated {r.simulated_ms:,.0f}: steps {r.steps[0]} to "
            f"{r.steps[1]}, {r.given_plans_ms:+.0f} ms of it given the plans, worst step {r.worst_step}"
            for r in self.requests
        ]
        return lines

    def shares(self, latency: str) -> dict[str, float]:
        """Term or `queueing` -> relative error of a mean latency that is due to it; `error`: all of it."""
        found = self.latencies[latency]
        shares = {name: ms / found["real"] for name, ms in found.items() if name != "real"}
        return {"error": sum(shares.values()), **shares}


def can_attribute(real: Run, simulated: Run) -> bool:
    """Whether the second is a simulation by a fitted cost model, and the first a whole record of one replica in which
    steps ran one after another (under `lag=0` each begins on an idle device, and nothing can be said of it)."""
    cost = simulated.info.get("cost") or {}
    return (
        real.kind == "real"
        and simulated.kind == "sim"
        and cost.get("kind") == "fitted"
        and real.has_steps
        and real.complete
        and real.steps["replica"].nunique() == 1
        and _any_in_a_row(real.steps)
    )


def _any_in_a_row(table: pd.DataFrame) -> bool:
    """Whether any step was planned while another ran."""
    ran = table[(table["num_decodes"] > 0) | (table["num_chunks"] > 0)]
    return bool((ran["plan_ns"].to_numpy()[1:] < ran["end_ns"].to_numpy()[:-1]).any())


def attribute(real: Run, simulated: Run, costs: FittedCost | None = None) -> Attribution:
    """Split the errors of a simulation. `costs`: its cost model, where it is at hand."""
    if costs is None:
        described = costs_as_described(simulated.info["cost"])
        assert isinstance(described, FittedCost)
        costs = described
    table = real.steps
    ran = table[(table["num_decodes"] > 0) | (table["num_chunks"] > 0)].reset_index(drop=True)
    errors, measured = _step_errors(real, costs, ran)
    total = measured.sum() or 1.0  # of no two steps in a row: all errors are 0
    shapes = _shapes(ran)
    kinds = np.array([regime(shape) for shape in shapes])
    off = sum(errors.values(), np.zeros(len(ran)))
    return Attribution(
        busy=float(measured.sum() / max(1, ran["end_ns"].iloc[-1] - ran["plan_ns"].iloc[0])),
        terms={name: float(values.sum() / total) for name, values in errors.items()},
        kinds=[_kind(str(kind), kinds, measured, off, total) for kind in sorted(set(kinds.tolist()))],
        latencies=_latencies(real, simulated, ran, errors),
        different_limits=sorted(
            name for name in {*real.limits, *simulated.limits} if real.limits.get(name) != simulated.limits.get(name)
        ),
        preemptions=(int(real.requests["preemptions"].sum()), int(simulated.requests["preemptions"].sum())),
        steps=_worst_steps(ran, kinds, errors, measured),
        requests=_worst_requests(real, simulated, ran, off),
    )


def _shapes(ran: pd.DataFrame) -> list[StepShape]:
    return [StepShape(*row) for row in ran[list(StepShape._fields)].itertuples(index=False, name=None)]


def _step_errors(real: Run, costs: FittedCost, ran: pd.DataFrame) -> tuple[dict[str, Float64], Float64]:
    """Term -> predicted minus measured nanoseconds of each step; and what was measured. 0 where a step began on an idle
    device.

    Of a step whose end the host came late to see, the device's share is not known: all of its error is the host's.
    """
    periods = busy_periods(real, costs)
    at = np.searchsorted(ran["step"].to_numpy(), periods.steps)
    measured, predicted = np.zeros(len(ran)), np.zeros(len(ran))
    measured[at], predicted[at] = periods.measured, periods.predicted
    known = measured > 0
    took = ran["device_ns"].to_numpy(np.float64)
    meant = np.array([periods.device_ns[step] for step in ran["step"].tolist()], np.float64)
    waited = [s.waited for s in samples_from_steps({str(name): real.steps[name].to_numpy() for name in real.steps})]
    exact = known & np.array(waited) & (took > 0)
    device = np.where(exact, meant - took, 0.0)
    errors = {"host": np.where(known, predicted - measured - device, 0.0)}
    by_term = _terms(costs, _shapes(ran), meant)
    errors |= _by_price(by_term, device, took, exact)
    errors["other"] = device - sum((errors[name] for name in by_term), np.zeros(len(ran)))
    return {name: errors[name] for name in TERMS if name in errors}, measured


def _terms(costs: FittedCost, shapes: list[StepShape], meant: Float64) -> dict[str, Float64]:
    """What the model's device time of each step is made of; `clocks`: what the steps before it add."""
    parts = [costs.device_terms(shape) for shape in shapes]
    found = {name: np.array([part.get(name, 0.0) for part in parts]) for name in DEVICE_TERMS}
    found["clocks"] = meant - sum(found.values(), np.zeros(len(shapes)))
    return {name: values for name, values in found.items() if np.abs(values).sum() > 1e-3 * meant.sum()}


def _by_price(
    terms: Mapping[str, Float64], device: Float64, took: Float64, exact: NDArray[np.bool_]
) -> dict[str, Float64]:
    """The share of the errors that each term explains if its price is off by some factor: ridge regression, of errors
    relative to the step's time."""
    if not exact.any() or not terms:
        return {name: np.zeros(len(device)) for name in terms}
    columns = np.column_stack([values[exact] / took[exact] for values in terms.values()])
    targets = device[exact] / took[exact]
    scale = np.sqrt((columns**2).mean(axis=0))
    columns = columns / scale
    penalty = _RIDGE * len(targets) * np.eye(len(scale))
    factors = np.linalg.solve(columns.T @ columns + penalty, columns.T @ targets) / scale
    return {name: np.where(exact, f * values, 0.0) for f, (name, values) in zip(factors, terms.items(), strict=True)}


def _kind(kind: str, kinds: NDArray[np.str_], measured: Float64, off: Float64, total: float) -> Kind:
    chosen = (kinds == kind) & (measured > 0)
    time = measured[chosen].sum()
    return Kind(kind, int(chosen.sum()), float(time / total), float(off[chosen].sum() / time) if time else 0.0)


def _latencies(
    real: Run, simulated: Run, ran: pd.DataFrame, errors: Mapping[str, Float64]
) -> dict[str, dict[str, float]]:
    """By term, of the requests that both completed."""
    requests = real.requests[real.requests["status"].isin(COMPLETED)]
    frames = [frame[frame["completed"]].set_index("request_id") for frame in map(per_request, (real, simulated))]
    both = requests[requests["request_id"].isin(frames[0].index.intersection(frames[1].index))]
    ids, outputs = both["request_id"].to_numpy(), both["output_tokens"].to_numpy()
    begins, firsts, ends = _spans(both, ran)
    found: dict[str, dict[str, float]] = {}
    for latency, column in COLUMNS.items():
        pair = [frame.loc[ids, column].to_numpy() for frame in frames]
        counted = ~np.isnan(pair[0]) & ~np.isnan(pair[1])
        if not counted.any():
            continue
        means = [float(values[counted].mean()) for values in pair]
        parts = {}
        for name, values in errors.items():
            sums = np.append(0.0, np.cumsum(values)) / 1e6
            to_first, to_end = sums[firsts] - sums[begins], sums[ends] - sums[begins]
            direct = {"ttft": to_first, "e2el": to_end, "tpot": (to_end - to_first) / np.maximum(1, outputs - 1)}
            parts[name] = float(direct[latency][counted].mean())
        parts[QUEUEING] = means[1] - means[0] - sum(parts.values())
        found[latency] = {"real": means[0], **parts}
    return found


def _spans(requests: pd.DataFrame, ran: pd.DataFrame) -> list[NDArray[np.int64]]:
    """How many steps had ended at each one's arrival, with its first token, and at its end."""
    ends = ran["end_ns"].to_numpy()
    columns = [requests[name].to_numpy(np.float64) for name in ("arrival_ns", "first_token_ns", "finish_ns")]
    return [np.searchsorted(ends, column.astype(np.int64), side="right") for column in columns]


def _worst_steps(
    ran: pd.DataFrame, kinds: NDArray[np.str_], errors: Mapping[str, Float64], measured: Float64
) -> list[WorstStep]:
    off = sum(errors.values(), np.zeros(len(ran)))
    found = []
    for i in np.argsort(-np.abs(off), kind="stable")[:WORST].tolist():
        term = max(errors, key=lambda name: abs(errors[name][i]))
        times = (float(measured[i]) / 1e6, float(measured[i] + off[i]) / 1e6)
        found.append(WorstStep(int(ran["step"].iloc[i]), str(kinds[i]), *times, term))
    return found


def _worst_requests(real: Run, simulated: Run, ran: pd.DataFrame, off: Float64) -> list[WorstRequest]:
    pair = [per_request(run).set_index("request_id")["e2e_ms"].dropna() for run in (real, simulated)]
    differences = (pair[1] - pair[0]).dropna()
    worst = differences.abs().sort_values(ascending=False, kind="stable").index[:WORST]
    rows = real.requests.set_index("request_id").loc[worst].reset_index()
    begins, _, ends = _spans(rows, ran)
    found = []
    for request_id, begin, end in zip(rows["request_id"].tolist(), begins.tolist(), ends.tolist(), strict=True):
        its, last = off[begin:end], max(begin, end - 1)
        step = ran["step"].iloc
        found.append(
            WorstRequest(
                request_id=int(request_id),
                real_ms=float(pair[0][request_id]),
                simulated_ms=float(pair[1][request_id]),
                steps=(int(step[begin]), int(step[last])),
                worst_step=int(step[begin + int(np.abs(its).argmax())]) if len(its) else int(step[begin]),
                given_plans_ms=float(its.sum()) / 1e6,
            )
        )
    return found
