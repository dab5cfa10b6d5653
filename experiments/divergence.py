"""Where two runs decided differently: decisions.parquet against decisions.parquet, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.records import Run

_COMPARED = ("request_id", "kind", "tokens", "reason")


@dataclass(frozen=True, slots=True)
class Divergence:
    """Two runs whose decisions are not the same.

    Attributes:
        replica, step: the first step (by the time of its plan) whose decisions differ.
        plan_ns: when it was planned, the earlier of both runs.
        num_steps: steps whose decisions differ.
        num_compared: steps with decisions in either run.
        decisions_a, decisions_b: what each decided in the first one, one text a decision.
    """

    replica: int
    step: int
    plan_ns: int
    num_steps: int
    num_compared: int
    decisions_a: tuple[str, ...]
    decisions_b: tuple[str, ...]

    def __str__(self) -> str:
        where = f"step {self.step}" + (f" of replica {self.replica}" if self.replica else "")
        return (
            f"the decisions differ first in {where}, at {self.plan_ns / 1e9:.6f} s, "
            f"and in {self.num_steps} of the {self.num_compared} steps in which either decided something"
        )


def diff_decisions(a: Run, b: Run) -> Divergence | None:
    """Compare what two runs decided in each step: kinds, requests, tokens, reasons, and their order. None: the same.

    Raises RunError where a run was recorded without decisions.
    """
    left, right = _ordered(a), _ordered(b)
    columns = ["replica", "step", *_COMPARED]
    if len(left) == len(right) and all((left[c].to_numpy() == right[c].to_numpy()).all() for c in columns):
        return None
    steps, differing = _differing(left, right)
    plan_ns = np.minimum(_plan_ns(a, steps), _plan_ns(b, steps))
    bad = np.flatnonzero(differing)
    first = bad[np.argmin(plan_ns[bad])]
    replica, step = steps[first].tolist()
    return Divergence(
        replica=replica,
        step=step,
        plan_ns=int(plan_ns[first]),
        num_steps=len(bad),
        num_compared=len(steps),
        decisions_a=_texts(left, replica, step),
        decisions_b=_texts(right, replica, step),
    )


def _ordered(run: Run) -> pd.DataFrame:
    """By replica and step; within a step in the order in which they were made, numbered as `place`.

    Where a run was cut short, the step in flight has decisions and no row: nobody knows how long it took.
    """
    decisions = run.decisions
    if not run.complete:
        decisions = decisions.merge(run.steps[["replica", "step"]], on=["replica", "step"])
    ordered = decisions.sort_values(["replica", "step"], kind="stable", ignore_index=True)
    return ordered.assign(place=ordered.groupby(["replica", "step"]).cumcount())


def _differing(left: pd.DataFrame, right: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """All (replica, step) of both runs, in order, and which of them differ."""
    both = left.merge(right, on=["replica", "step", "place"], how="outer", suffixes=("_a", "_b"), indicator=True)
    unequal = (both["_merge"] != "both").to_numpy()
    for column in _COMPARED:
        unequal = unequal | (both[f"{column}_a"] != both[f"{column}_b"]).to_numpy()
    by_step = both.assign(unequal=unequal).groupby(["replica", "step"], sort=True)["unequal"].any()
    return np.array(by_step.index.to_list(), np.int64).reshape(-1, 2), by_step.to_numpy()


def _plan_ns(run: Run, steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """When these steps were planned; the largest time for those that the run does not have."""
    wanted = pd.DataFrame(steps, columns=["replica", "step"])
    found = wanted.merge(run.steps[["replica", "step", "plan_ns"]], on=["replica", "step"], how="left")["plan_ns"]
    missing = found.isna().to_numpy()
    return np.where(missing, np.iinfo(np.int64).max, found.fillna(0).to_numpy(np.int64))


def _texts(decisions: pd.DataFrame, replica: int, step: int) -> tuple[str, ...]:
    rows = decisions[(decisions["replica"] == replica) & (decisions["step"] == step)]
    return tuple(
        f"{kind} {'group' if request < 0 else f'request {request}'}"
        + (f", {tokens} tokens" if tokens else "")
        + (f" ({reason})" if reason else "")
        for request, kind, tokens, reason in rows[list(_COMPARED)].itertuples(index=False)
    )
