"""Capacity curves: what each policy came to at each load that it was tried at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

COLUMNS = ["kind", "policy", "rate", "value", "runs"]

_FREE = ("workload.rate", "workload.time_scale", "workload.n", "workload.seed")
"""Knobs in which runs of one curve may differ: a sweep over the load often keeps how long it lasts, not how many."""


def same_workload(row: Mapping[str, Any]) -> str:
    """What runs of one curve have in common: the model, and every field of the workload but for how many requests come
    how fast."""
    fields = {name: value for name, value in row["knobs"].items() if name.startswith(("workload.", "model."))}
    return json.dumps({name: value for name, value in fields.items() if name not in _FREE}, sort_keys=True)


def load_curves(rows: Sequence[Mapping[str, Any]], objective: str) -> pd.DataFrame:
    """An objective over the offered load, from rows of `study.study_row`: one line for each panel and policy that was
    tried at two rates at least.

    Columns: `kind`, `policy`, `rate` (requests a second that arrive), `value`, and of how many runs it is the mean;
    in order of the panel, the policy and the rate. Workloads without a rate (times from a trace) are left out.
    """
    points = [(row["kind"], row["policy"], _offered(row["knobs"]), row[objective]) for row in rows]
    frame = pd.DataFrame(points, columns=COLUMNS[:4]).dropna()
    if not len(frame):
        return pd.DataFrame(columns=COLUMNS)
    frame = frame.astype({"rate": float, "value": float})
    means = frame.groupby(COLUMNS[:3], sort=True)["value"].agg(value="mean", runs="size").reset_index()
    tried = means.groupby(["kind", "policy"])["rate"].transform("nunique")
    return means[tried > 1].reset_index(drop=True)


def _offered(knobs: Mapping[str, Any]) -> float | None:
    """Requests a second that arrive; None where the workload has no rate."""
    rate = knobs.get("workload.rate")
    return None if rate is None else rate / knobs.get("workload.time_scale", 1.0)
