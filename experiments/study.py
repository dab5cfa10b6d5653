"""A folder of runs as one table: what each was, what came of it, which policies rank where, what no other one beats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.fairness import jain_index, service_difference
from experiments.metrics import per_request, summarize
from experiments.records import Run
from policies.registry import PolicyError, PolicySpec
from policies.stack import StackSpec


@dataclass(frozen=True, slots=True)
class Objective:
    """Something to choose policies by."""

    title: str
    unit: str
    lower_is_better: bool = True

    @property
    def label(self) -> str:
        """With its unit, for axes and headings."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


OBJECTIVES = {
    "output_throughput": Objective("output tokens", "tok/s", False),
    "request_throughput": Objective("requests", "req/s", False),
    "slo_goodput": Objective("goodput", "req/s", False),
    "median_ttft_ms": Objective("TTFT p50", "ms"),
    "p99_ttft_ms": Objective("TTFT p99", "ms"),
    "median_tpot_ms": Objective("TPOT p50", "ms"),
    "p99_tpot_ms": Objective("TPOT p99", "ms"),
    "median_e2el_ms": Objective("E2E p50", "ms"),
    "p99_e2el_ms": Objective("E2E p99", "ms"),
    "fairness": Objective("fairness", "Jain's index", False),
    "service_difference": Objective("service difference", "weighted tokens"),
    "kv_share": Objective("KV blocks in use, mean", "%"),
    "preemptions": Objective("preemptions", "count"),
}
"""Columns of a study's table -> what they are. Fairness is Jain's index of the requests' E2E per output token: 1 where
all are served equally fast. The service difference is the largest one between tenants, where there are several."""

PANELS = {"real": "real", "sim": "simulated"}
"""Kinds of runs that are ranked -> what a figure calls them."""

PARETO = (("output_throughput", "p99_ttft_ms"), ("output_throughput", "fairness"), ("output_throughput", "kv_share"))
"""Pairs of objectives (across, up) that are drawn against each other."""

ROLES = ("scheduler", "queue", "admission", "preemption", "eviction", "offload", "router")


def study_row(run: Run) -> dict[str, Any]:
    """One run: name, kind, policy, workload, its knobs (a dict: see `knobs`), and every objective (None: unknown)."""
    summary = summarize(run)
    found = {**summary, **shares(run, per_request(run), summary["mean_kv_blocks"])}
    return {
        "run": run.name,
        "kind": run.kind,
        "policy": policy_name(run.spec),
        "workload": workload_name(run.spec),
        "clairvoyant": run.clairvoyant,
        "completed": summary["completed"],
        "failed": summary["failed"],
        "knobs": dict(knobs(run.spec)),
        **{name: found.get(name) for name in OBJECTIVES},
    }


def shares(run: Run, frame: pd.DataFrame, mean_kv_blocks: float | None) -> dict[str, float | None]:
    """The objectives that no summary has, of the requests in `frame` (some of `per_request`'s)."""
    done = frame[frame["completed"] & (frame["output_tokens"] > 0)]
    tenants = set(run.requests["tenant"])
    blocks = run.limits.get("num_blocks")
    replicas = int(run.spec.get("replicas") or 1)
    if blocks and run.pools:  # as they are at the start
        blocks, replicas = sum(pool["replicas"] * pool["limits"]["num_blocks"] for pool in run.pools), 1
    return {
        "fairness": jain_index(done["e2e_ms"] / done["output_tokens"]) if len(done) else None,
        "service_difference": float(service_difference(run).max()) if len(tenants) > 1 else None,
        "kv_share": 100.0 * mean_kv_blocks / (blocks * replicas) if mean_kv_blocks is not None and blocks else None,
    }


def policy_name(spec: Mapping[str, Any]) -> str:
    """The stack in short: the scheduler, and what else is not as it is by default."""
    policies = spec.get("policies") or {}
    usual = {**StackSpec().as_dict(), "router": "round_robin"}
    parts = [str(policies[role]) for role in ROLES if role in policies and (policies[role] != usual[role])]
    scheduler = str(policies.get("scheduler", usual["scheduler"]))
    return " + ".join(parts if scheduler in parts else [scheduler, *parts])


def workload_name(spec: Mapping[str, Any]) -> str:
    """A workload in short; runs with the same one, all fields alike, can be ranked."""
    workload = {name: value for name, value in (spec.get("workload") or {}).items() if value is not None}
    first = [str(workload.pop("name", "?")).rsplit("/", 1)[-1]]
    usual = {"n": "n", "rate": "rate", "seed": "seed"}
    first += [f"{short}={workload.pop(name):.4g}" for name, short in usual.items() if name in workload]
    rest = json.dumps(workload, sort_keys=True)
    return ", ".join(first) + (f" [{_digest(rest)}]" if workload else "")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:4]


def knobs(spec: Mapping[str, Any]) -> Iterator[tuple[str, str | float]]:
    """Every field of a specification that may be turned, by its path; a policy's knobs stand below its role."""
    for group in ("workload", "limits", "cost", "model"):
        for field, value in (spec.get(group) or {}).items():
            if isinstance(value, (str, int, float)):
                yield f"{group}.{field}", value
    for field in ("replicas", "seed"):
        if field in spec:
            yield field, spec[field]
    for role, text in (spec.get("policies") or {}).items():
        try:
            policy = PolicySpec.parse(text)
        except PolicyError:
            continue
        yield f"policies.{role}", policy.name
        for knob, value in policy.knobs.items():
            yield f"policies.{role}.{knob}", number(value)


def number(value: Any) -> Any:
    """A knob's value as a number, where it is one, else as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def turned(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The knobs whose value is not the same in all of these runs, in order of name."""
    names = sorted({name for row in rows for name in row["knobs"]})
    return [name for name in names if len({str(row["knobs"].get(name)) for row in rows}) > 1]


def pareto(x: NDArray[np.float64], y: NDArray[np.float64], lower_x: bool, lower_y: bool) -> NDArray[np.bool_]:
    """Which points no other one beats: none is at least as good in both and better in one. nan is never among them."""
    x, y = (x if lower_x else -x), (y if lower_y else -y)
    known = ~np.isnan(x) & ~np.isnan(y)
    kept = np.zeros(len(x), bool)
    best = np.inf
    order = np.lexsort([y, x])
    at = 0
    while at < len(order):
        same_x = [i for i in order[at:] if x[i] == x[order[at]]] if known[order[at]] else [order[at]]
        at += len(same_x)
        if known[same_x[0]] and (low := min(y[i] for i in same_x if known[i])) < best:
            kept[[i for i in same_x if known[i] and y[i] == low]] = True
            best = low
    return kept


@dataclass(frozen=True)
class Agreement:
    """Whether two panels rank the policies alike.

    Attributes:
        ranking: rows by policy, columns `real` and `sim` (values) and `rank_real`, `rank_sim` (1 is best).
        tau: Kendall's tau-b of both rankings, 1 where they are the same; None where there are fewer than two policies.
        same_best: whether both put the same policy first.
    """

    ranking: pd.DataFrame
    tau: float | None
    same_best: bool

    def __str__(self) -> str:
        count = len(self.ranking)
        if self.tau is None:
            return f"{count} polic{'y' if count == 1 else 'ies'} in both panels; it takes two to rank"
        best = "both put the same policy first" if self.same_best else "they put different policies first"
        return f"{count} policies in both panels: {best}; Kendall's tau {self.tau:+.2f}"


def agreement(table: pd.DataFrame, objective: str) -> Agreement:
    """Rank the policies that ran in both panels; several runs of one policy in one panel count by their mean."""
    lower = OBJECTIVES[objective].lower_is_better
    both = table[table["kind"].isin(["real", "sim"])].dropna(subset=[objective])
    values = both.pivot_table(index="policy", columns="kind", values=objective, aggfunc="mean")
    values = values.reindex(columns=["real", "sim"]).dropna()
    for kind in ("real", "sim"):
        values[f"rank_{kind}"] = values[kind].rank(ascending=lower, method="min").astype(int)
    values = values.sort_values(["rank_real", "rank_sim"], kind="stable")
    if len(values) < 2:
        return Agreement(values, None, False)
    from scipy.stats import kendalltau  # slow to import, and whoever measures a run needs this module

    tau = float(kendalltau(values["rank_real"], values["rank_sim"]).statistic)
    first = [set(values.index[values[f"rank_{kind}"] == 1]) for kind in ("real", "sim")]
    return Agreement(values, None if np.isnan(tau) else tau, bool(first[0] & first[1]))


def grid(rows: Sequence[Mapping[str, Any]], x: str, y: str, objective: str) -> pd.DataFrame:
    """An objective over two knobs: rows by y's values, columns by x's, in order; the mean where several runs meet."""
    cells = pd.DataFrame(
        [(row["knobs"].get(x), row["knobs"].get(y), row[objective]) for row in rows], columns=["x", "y", "value"]
    ).dropna()
    cells["value"] = cells["value"].astype(float)
    table = cells.pivot_table(index="y", columns="x", values="value", aggfunc="mean", sort=False)
    return table.loc[sorted(table.index, key=_order), sorted(table.columns, key=_order)]


def _order(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if isinstance(value, (int, float)) else (1, 0.0, str(value))
