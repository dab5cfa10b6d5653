"""How sure a mean over repeats is, and a difference between two of them.

Student's t interval: mean +- t(n - 1) s / sqrt(n), for independent repeats, here runs of different seeds. Of pairs that
share a seed, and so the same arrivals, the differences are taken first: what the draw did to both drops out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, and how far from it the true one may be at `LEVEL`; None where one repeat says nothing of that."""

    mean: float
    half: float | None
    count: int

    @property
    def apart_from_zero(self) -> bool:
        """Whether 0 is outside."""
        return self.half is not None and abs(self.mean) > self.half


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean of repeats. Raises ValueError where there is none."""
    if not len(values):
        raise ValueError("there is no mean of no values")
    known = np.asarray(values, np.float64)
    if len(known) < 2:
        return Interval(float(known.mean()), None, len(known))
    spread = float(known.std(ddof=1)) / len(known) ** 0.5
    return Interval(float(known.mean()), t_quantile(len(known) - 1, (1 + level) / 2) * spread, len(known))


def t_quantile(degrees: int, share: float) -> float:
    """The value below which this share of Student's t distribution lies."""
    from scipy.special import stdtrit  # slow to import, and every command begins with importing this module

    return float(stdtrit(degrees, share))


def paired(one: Sequence[float], other: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean difference `other - one` of pairs. Raises ValueError unless there are as many of each, and some."""
    if len(one) != len(other):
        raise ValueError(f"pairs need as many of each, not {len(one)} and {len(other)}")
    return interval((np.asarray(other, np.float64) - np.asarray(one, np.float64)).tolist(), level)
