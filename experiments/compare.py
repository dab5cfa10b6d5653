"""Two runs of one workload side by side: how far the second (simulated) is from the first (real).

Latencies are compared over the requests that both runs completed, matched by request_id; throughput is each whole
run's. A signed relative error is (b - a) / a.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.divergence import Divergence, diff_decisions
from experiments.metrics import LATENCIES, goodput, latencies_ms, per_request, summarize
from experiments.records import Run, RunError

Float64 = NDArray[np.float64]

TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}
THROUGHPUTS = {
    "request_throughput": ("Requests", "req/s"),
    "output_throughput": ("Output tokens", "tok/s"),
    "total_token_throughput": ("All tokens", "tok/s"),
    "slo_goodput": ("Goodput", "req/s"),
    "request_goodput": ("Goodput within limits", "req/s"),
}
ESTIMATES = {
    "estimated_joule_per_output_token": ("Energy (estimate)", "J/output tok"),
    "estimated_price_per_million_output_tokens": ("Price (estimate)", "per 1M output tok"),
}
STATISTICS = ("mean", "p50", "p90", "p99")
_PER_REQUEST = {"ttft": "ttft_ms", "tpot": "tpot_ms", "e2el": "e2e_ms"}


@dataclass(frozen=True, slots=True)
class Pair:
    """One figure of both runs. `error` is (b - a) / a; None where a is 0 or one of them is missing."""

    a: float | None
    b: float | None

    @property
    def error(self) -> float | None:
        return None if self.a is None or self.b is None or self.a == 0 else (self.b - self.a) / self.a

    def as_dict(self) -> dict[str, float | None]:
        """Both figures and the error."""
        return {"a": self.a, "b": self.b, "error": self.error}


@dataclass(frozen=True, slots=True)
class Spread:
    """How far single requests are off, and their distributions apart. None where no request has the latency.

    Attributes:
        mean_ape, p50_ape, p90_ape: absolute error of each request relative to run a (0.1 is a tenth).
        ks: Kolmogorov-Smirnov distance of the two distributions, 0 to 1.
    """

    mean_ape: float | None
    p50_ape: float | None
    p90_ape: float | None
    ks: float | None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the comparison as it is shown, by every renderer."""

    metric: str
    unit: str
    a: str
    b: str
    error: str


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        a, b: the runs; their summaries are in `summary_a` and `summary_b`.
        matched: requests that both completed. only_a, only_b: completed by one alone, or unknown to the other.
        latencies: latency name (`ttft`, `tpot`, `itl`, `e2el`) -> statistic (`mean`, `p50`, ...) -> both figures, ms.
        throughputs: key of `vllm bench serve` -> both figures.
        spreads: latency name -> errors of single requests; `itl` has only the distance of distributions.
        steps: steps that computed something.
        divergence: where the decisions differ; None if they are the same, or if `decisions_compared` is False because
            a run was recorded without them.
    """

    a: Run
    b: Run
    summary_a: dict[str, Any]
    summary_b: dict[str, Any]
    matched: int
    only_a: int
    only_b: int
    latencies: dict[str, dict[str, Pair]]
    throughputs: dict[str, Pair]
    spreads: dict[str, Spread]
    steps: Pair
    decisions_compared: bool
    divergence: Divergence | None

    def figures(self) -> list[tuple[str, str, Pair]]:
        """(metric, unit, both figures): TTFT, TPOT and E2E at p50, p90 and p99, throughput, the largest service gap.

        Goodput is there where requests of both runs came with objectives, the gap where tenants waited at once.
        """
        latencies = [
            (f"{TITLES[name]} {statistic}", "ms", self.latencies[name][statistic])
            for name in ("ttft", "tpot", "e2el")
            for statistic in ("p50", "p90", "p99")
        ]
        figures = latencies + [(*THROUGHPUTS[key], self.throughputs[key]) for key in self.throughputs]
        figures += [
            (name, unit, pair) for name, unit, pair in self._estimates() if pair.a is not None or pair.b is not None
        ]
        gap = Pair(self.summary_a["largest_service_gap"], self.summary_b["largest_service_gap"])
        return figures if gap.a is None and gap.b is None else [*figures, ("Service gap", "weighted tok", gap)]

    def _estimates(self) -> list[tuple[str, str, Pair]]:
        """What tokens are estimated to take, of simulated runs."""
        return [
            (name, unit, Pair(self.summary_a.get(key), self.summary_b.get(key)))
            for key, (name, unit) in ESTIMATES.items()
        ]

    def rows(self) -> list[Row]:
        """The lines of the table: `figures` as text."""
        return [_row(*figure) for figure in self.figures()]

    def notes(self) -> list[str]:
        """What has to be said below the table."""
        notes = [f"{self.matched} requests completed in both runs"]
        if self.only_a or self.only_b:
            notes[0] += f" ({self.only_a} only in {self.a.name}, {self.only_b} only in {self.b.name}: left out)"
        outside = sorted({run.name for run in (self.a, self.b) if not run.has_steps})
        if outside:
            notes.append(
                f"measured by a client, with the way to the server and back, and without steps, decisions, queues and "
                f"memory: {', '.join(outside)}"
            )
        else:
            notes.append(f"steps that ran: {self.steps.a} and {self.steps.b}; {self.decisions_line()}")
        other = self.other_step_times()
        notes += [] if other is None else [other]
        if "slo_ms" in self.summary_a:
            limits = ", ".join(f"{TITLES[name]} {ms:,g} ms" for name, ms in self.summary_a["slo_ms"].items())
            notes.append(f"goodput within limits: requests a second that completed within {limits}")
        marked = sorted({run.name for run in (self.a, self.b) if run.clairvoyant})
        if marked:
            notes.append(f"clairvoyant (a policy knows true output lengths): {', '.join(marked)}")
        broken = sorted({run.name for run in (self.a, self.b) if not run.complete})
        if broken:
            notes.append(f"incomplete (as far as it was recorded): {', '.join(broken)}")
        return notes

    def other_step_times(self) -> str | None:
        """That a simulation beside a real run is of another model, or of a device's data sheet; None where not."""
        if {self.a.kind, self.b.kind} != {"real", "sim"}:
            return None
        real, simulated = (self.a, self.b) if self.a.kind == "real" else (self.b, self.a)
        cost = simulated.info.get("cost") or {}
        served = real.info.get("model")
        if cost.get("kind") == "roofline":
            what = f"{cost['model']['name']} by the data sheet of {cost['device']['name']}"
        else:
            what = cost.get("provenance", {}).get("model")
            if None in (served, what) or served == what:
                return None
        return (
            f"what ran: {real.name} served {served}, {simulated.name} simulates {what}; "
            f"for a simulation of what was served: diptych profile, then diptych simulate --calibration"
        )

    def decisions_line(self) -> str:
        """Whether the runs decided alike, in one line."""
        if not self.decisions_compared:
            return "decisions were not recorded in both runs"
        if self.divergence is None:
            return "the decisions are the same in every step"
        kinds = {self.a.kind, self.b.kind}
        free = " (as step times differ; at equal times: diptych replay)" if kinds == {"real", "sim"} else ""
        return f"{self.divergence}{free}"

    def as_dict(self) -> dict[str, Any]:
        """JSON values: everything but the records themselves."""
        return {
            "a": self.summary_a,
            "b": self.summary_b,
            "matched": self.matched,
            "only_a": self.only_a,
            "only_b": self.only_b,
            "latencies_ms": {
                name: {statistic: pair.as_dict() for statistic, pair in of.items()}
                for name, of in self.latencies.items()
            },
            "throughputs": {key: pair.as_dict() for key, pair in self.throughputs.items()},
            "per_request": {name: asdict(spread) for name, spread in self.spreads.items()},
            "steps": self.steps.as_dict(),
            "decisions_compared": self.decisions_compared,
            "divergence": None if self.divergence is None else asdict(self.divergence),
        }

    def to_json(self) -> str:
        """`as_dict` as text."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False)


def compare(a: Run, b: Run, *, decisions: bool = True) -> Comparison:
    """Compare a run with a reference run `a`. Raises RunError for records that cannot be read or matched.

    `decisions=False` leaves their decisions out, which takes most of the time of long runs.
    """
    frame_a, frame_b = (per_request(run)[lambda f: f["completed"]] for run in (a, b))
    for run, frame in ((a, frame_a), (b, frame_b)):
        if frame["request_id"].duplicated().any():
            raise RunError(f"{run.folder}: two requests have the same request_id; they cannot be matched")
    both = frame_a.merge(frame_b, on="request_id", suffixes=("_a", "_b"))
    ids = both["request_id"].to_numpy()
    samples_a, samples_b = latencies_ms(a, ids), latencies_ms(b, ids)
    spreads = {
        name: _spread(both[f"{column}_a"].to_numpy(), both[f"{column}_b"].to_numpy())
        for name, column in _PER_REQUEST.items()
    }
    spreads["itl"] = Spread(None, None, None, ks_distance(samples_a["itl"], samples_b["itl"]))
    summary_a, summary_b = summarize(a), summarize(b)
    with_decisions = decisions and a.has_decisions and b.has_decisions
    return Comparison(
        a=a,
        b=b,
        summary_a=summary_a,
        summary_b=summary_b,
        matched=len(both),
        only_a=len(frame_a) - len(both),
        only_b=len(frame_b) - len(both),
        latencies={name: _pairs(samples_a[name], samples_b[name]) for name in LATENCIES},
        throughputs={
            key: Pair(summary_a[key], summary_b[key])
            for key in THROUGHPUTS
            if None not in (summary_a.get(key), summary_b.get(key))
        },
        spreads=spreads,
        steps=Pair(summary_a["steps"], summary_b["steps"]),
        decisions_compared=with_decisions,
        divergence=diff_decisions(a, b) if with_decisions else None,
    )


def with_objectives(comparison: Comparison, slo: Mapping[str, float]) -> Comparison:
    """The comparison with the goodput by these objectives (milliseconds, some of `ttft`, `tpot`, `e2el`), where there
    are any. Raises ValueError for others."""
    if not slo:
        return comparison
    values = [goodput(run, slo) for run in (comparison.a, comparison.b)]
    summaries = [
        {**summary, "slo_ms": dict(slo), "request_goodput": value}
        for summary, value in zip((comparison.summary_a, comparison.summary_b), values, strict=True)
    ]
    throughputs = {**comparison.throughputs, "request_goodput": Pair(*values)}
    return replace(comparison, summary_a=summaries[0], summary_b=summaries[1], throughputs=throughputs)


def ks_distance(a: Float64, b: Float64) -> float | None:
    """The largest difference of two empirical distribution functions (Kolmogorov, Smirnov). None without samples."""
    if not len(a) or not len(b):
        return None
    a, b = np.sort(a), np.sort(b)
    at = np.concatenate([a, b])
    below_a = np.searchsorted(a, at, side="right") / len(a)
    below_b = np.searchsorted(b, at, side="right") / len(b)
    return float(np.max(np.abs(below_a - below_b)))


def _pairs(a: Float64, b: Float64) -> dict[str, Pair]:
    def values(samples: Float64) -> list[float | None]:
        if not len(samples):
            return [None] * len(STATISTICS)
        return [float(np.mean(samples)), *np.percentile(samples, [50, 90, 99]).tolist()]

    return {name: Pair(x, y) for name, x, y in zip(STATISTICS, values(a), values(b), strict=True)}


def _spread(a: Float64, b: Float64) -> Spread:
    has_both = ~np.isnan(a) & ~np.isnan(b)
    a, b = a[has_both], b[has_both]
    if not len(a):
        return Spread(None, None, None, None)
    errors = np.abs(b - a)[a > 0] / a[a > 0]
    p50, p90 = np.percentile(errors, [50, 90]).tolist() if len(errors) else (None, None)
    return Spread(float(np.mean(errors)) if len(errors) else None, p50, p90, ks_distance(a, b))


def _row(metric: str, unit: str, pair: Pair) -> Row:
    error = "–" if pair.error is None else f"{pair.error:+.1%}"
    return Row(metric, unit, format_figure(pair.a), format_figure(pair.b), error)


def format_figure(value: float | None) -> str:
    """Four significant digits, thousands apart, no exponent; a dash for what is missing."""
    if value is None:
        return "–"
    if np.isinf(value):
        return "∞" if value > 0 else "-∞"
    decimals = 0 if value == 0 else max(0, 3 - int(np.floor(np.log10(abs(value)))))
    return f"{value:,.{min(decimals, 6)}f}"
