"""What a rate has to meet: limits on figures of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.metrics import COLUMNS, PERCENTILES
from experiments.spec import SpecError

_LATENCY = re.compile(r"(?:(mean|median|p\d+(?:\.\d+)?)_)?(ttft|tpot|itl|e2el)")
USUAL = "p99"


@dataclass(frozen=True)
class Objective:
    """A figure of `sweeps.measuring` and its limit.

    Attributes:
        figure: a latency's key, as p99_ttft_ms; or `attainment`, the share of the requests within their objectives.
        limit: in milliseconds, not to be passed; of `attainment` the least share.
    """

    figure: str
    limit: float

    def load(self, figures: Mapping[str, float | None]) -> float:
        """The share of the limit that a run takes: 1 is just met, infinite for a run that has no such figure."""
        value = figures.get(self.figure)
        if self.figure == "attainment":
            value = attainment(figures)
            missed = None if value is None else 1.0 - value
            if missed is None or (self.limit == 1.0 and missed > 0):
                return float("inf")
            return missed / (1.0 - self.limit) if self.limit < 1.0 else 0.0
        return float("inf") if value is None else value / self.limit

    def __str__(self) -> str:
        if self.figure == "attainment":
            return f"{self.limit:.4g} of the requests within their objectives"
        return f"{self.figure.removesuffix('_ms')} {self.limit:g} ms"


def attainment(figures: Mapping[str, float | None]) -> float | None:
    """The share of the requests within their objectives: those of the measure, else those that they came with."""
    goodput, duration, count = (figures.get(name) for name in ("request_goodput", "duration", "num_prompts"))
    if goodput is None:
        return figures.get("slo_attainment")
    return goodput * (duration or 0.0) / count if count else None


def parse_objectives(given: Sequence[str]) -> tuple[Objective, ...]:
    """From `p99_ttft:200`, `mean_e2el:5000`, `tpot:50` (p99) and `goodput:0.9`. Raises SpecError."""
    return tuple(_parse(text) for text in given)


def _parse(text: str) -> Objective:
    name, _, value = text.partition(":")
    try:
        limit = float(value)
    except ValueError:
        raise SpecError(f"--slo {text}: write a limit in ms, as p99_ttft:200, or a share, goodput:0.9") from None
    if name == "goodput":
        if not 0 < limit <= 1:
            raise SpecError(f"--slo {text}: goodput's limit is a share of the requests, above 0 and at most 1")
        return Objective("attainment", limit)
    match = _LATENCY.fullmatch(name)
    if match is None:
        known = ", ".join([*COLUMNS, "itl"])
        raise SpecError(f"--slo {text}: there is no {name!r}; write STATISTIC_LATENCY:MS, of {known}, or goodput:SHARE")
    if not 0 < limit < float("inf"):
        raise SpecError(f"--slo {text}: a limit is a number of milliseconds above 0")
    statistic = match[1] or USUAL
    if statistic.startswith("p") and float(statistic[1:]) not in PERCENTILES:
        percentiles = ", ".join(f"p{percentile:g}" for percentile in PERCENTILES)
        raise SpecError(f"--slo {text}: give one of mean, median, {percentiles}")
    return Objective(f"{statistic}_{match[2]}_ms", limit)
