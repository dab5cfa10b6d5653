"""Length distributions: quantile tables (inverse CDF) and mixtures of lognormals.

Figures are statistics of public traces: Azure 2023 conversation and code (Splitwise), Mooncake conversation
(FAST 2025), the Arena log of VTC (OSDI 2024), ShareGPT-8k (Etalon), arXiv summarization (Vidur), an
LMSYS-Chat-1M sample (APEX), deepseek-r1 over a day (ServeGen). Token counts come from those sources'
tokenizers. In all of these input and output are close to independent, so they are drawn independently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

#: Probabilities of the tables' entries.
GRID = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1)


class Lengths(Protocol):
    """Something to draw token counts from."""

    def draw(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`n` token counts, each >= 1."""


@dataclass(frozen=True)
class QuantileTable:
    """Inverse CDF at `grid`, linear in between, rounded to whole tokens.

    Raises:
        ValueError: values and grid of different lengths, or not increasing.
    """

    values: tuple[float, ...]
    grid: tuple[float, ...] = GRID

    def __post_init__(self) -> None:
        if len(self.values) != len(self.grid):
            raise ValueError(f"{len(self.values)} values for {len(self.grid)} probabilities")
        if np.any(np.diff(self.values) < 0) or np.any(np.diff(self.grid) <= 0):
            raise ValueError("a quantile table must not decrease")

    def at(self, p: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """Quantiles at probabilities `p`, not rounded."""
        return np.asarray(np.interp(np.asarray(p, np.float64), self.grid, self.values))

    def draw(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`n` token counts, each >= 1."""
        return np.maximum(np.rint(self.at(rng.random(n))), 1).astype(np.int64)


@dataclass(frozen=True)
class LognormalMixture:
    """A mixture of lognormals, clipped to [low, high] tokens: smooth where a table would show its knots.

    Raises:
        ValueError: parts of different lengths, or weights that do not sum to 1 within 0.001.
    """

    weights: tuple[float, ...]
    mu: tuple[float, ...]
    sigma: tuple[float, ...]
    low: int
    high: int

    def __post_init__(self) -> None:
        if not len(self.weights) == len(self.mu) == len(self.sigma):
            raise ValueError("weights, mu and sigma must have the same length")
        if abs(sum(self.weights) - 1) > 1e-3 or min(self.weights) < 0:
            raise ValueError(f"weights sum to {sum(self.weights)}; they must sum to 1")

    def draw(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`n` token counts, each >= 1."""
        part = rng.choice(len(self.weights), n, p=np.array(self.weights) / sum(self.weights))
        drawn = rng.lognormal(np.array(self.mu)[part], np.array(self.sigma)[part])
        return np.rint(np.clip(drawn, max(self.low, 1), self.high)).astype(np.int64)


@dataclass(frozen=True)
class Constant:
    """Always the same."""

    tokens: int

    def draw(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`n` times `tokens`."""
        return np.full(n, self.tokens, np.int64)


#: name -> (input, output)
TABLES: dict[str, tuple[QuantileTable, QuantileTable]] = {
    "azure_conv": (
        QuantileTable(
            (
                2,
                29,
                181,
                207,
                387,
                403,
                703,
                1020,
                1071,
                1130,
                1315,
                2734,
                4083,
                4098,
                4142,
                4831,
                6179,
                14050,
            )
        ),
        QuantileTable((7, 16, 41, 54, 77, 91, 103, 129, 177, 384, 400, 424, 451, 540, 601, 643, 954, 1000)),
    ),
    "azure_code": (
        QuantileTable(
            (3, 17, 75, 147, 386, 770, 1075, 1469, 1909, 2433, 3192, 5188, 7303, 7436, 7436, 7436, 7437, 7437)
        ),
        QuantileTable((6, 6, 6, 7, 8, 9, 11, 13, 16, 20, 29, 55, 90, 171, 251, 359, 825, 1899)),
    ),
    "mooncake_conversation": (
        QuantileTable(
            (
                891,
                894,
                901,
                964,
                1662,
                3263,
                4993,
                6909,
                9570,
                13196,
                17869,
                27367,
                39550,
                66449,
                85400,
                100810,
                121301,
                126195,
            )
        ),
        QuantileTable((1, 3, 10, 24, 100, 213, 291, 350, 399, 447, 504, 597, 698, 892, 1119, 1568, 2000, 2000)),
    ),
    "vtc_arena": (
        QuantileTable((2, 2, 2, 5, 10, 16, 24, 40, 68, 124, 214, 432, 653, 787, 902, 956, 1015, 1021)),
        QuantileTable((2, 3, 10, 18, 43, 85, 141, 211, 308, 400, 511, 513, 513, 656, 785, 884, 977, 977)),
    ),
    "sharegpt_8k": (
        QuantileTable(
            (1, 12, 29, 74, 382, 777, 1203, 1730, 2401, 3235, 4278, 5696, 6563, 7164, 7434, 7622, 7854, 8141)
        ),
        QuantileTable((2, 6, 44, 84, 181, 271, 346, 415, 493, 581, 683, 834, 920, 975, 998, 1009, 1021, 1024)),
    ),
    "arxiv_summarization": (
        QuantileTable(
            (
                1,
                73,
                749,
                1242,
                1802,
                2150,
                2453,
                2730,
                2996,
                3249,
                3490,
                3702,
                3813,
                3892,
                3933,
                3963,
                4012,
                4054,
            )
        ),
        QuantileTable((5, 36, 60, 78, 104, 125, 145, 167, 192, 222, 268, 372, 736, 2775, 3271, 3582, 3844, 4056)),
    ),
    "lmsys": (
        QuantileTable((2, 2, 3, 5, 8, 10, 13, 17, 24, 36, 66, 177, 308, 484, 586, 684, 767, 1037)),
        QuantileTable((1, 2, 8, 12, 28, 50, 79, 117, 165, 227, 300, 389, 436, 481, 533, 605, 754, 761)),
    ),
    "deepseek_r1": (
        QuantileTable((4, 9, 13, 18, 29, 57, 110, 208, 265, 404, 735, 2044, 6502, 16072, 23448, 28378, 33702, 55955)),
        QuantileTable(
            (
                30,
                140,
                224,
                287,
                386,
                469,
                583,
                786,
                1100,
                1362,
                1667,
                3396,
                5630,
                9271,
                12534,
                15698,
                20537,
                29564,
            )
        ),
    ),
}

#: EM fits with a Kolmogorov-Smirnov distance to the data of at most 0.04, clipped to the data's range.
MIXTURES: dict[str, tuple[LognormalMixture, LognormalMixture]] = {
    "mooncake_conversation": (
        LognormalMixture((0.0983, 0.1051, 0.7966), (6.813, 7.212, 9.175), (0.03, 0.229, 0.918), 891, 126195),
        LognormalMixture((0.2484, 0.3125, 0.4391), (3.503, 5.769, 6.066), (1.511, 0.625, 0.258), 1, 2000),
    ),
    "arxiv_summarization": (
        LognormalMixture((0.0925, 0.5457, 0.3617), (6.114, 7.711, 8.134), (1.534, 0.297, 0.095), 1, 4054),
        LognormalMixture((0.3545, 0.6068, 0.0388), (5.029, 5.106, 7.889), (0.791, 0.431, 0.262), 5, 4056),
    ),
    "sharegpt_8k": (
        LognormalMixture((0.2022, 0.5363, 0.2615), (4.337, 7.303, 8.463), (1.221, 0.716, 0.297), 1, 8141),
        LognormalMixture((0.2646, 0.5813, 0.1541), (4.6, 6.056, 6.695), (1.173, 0.399, 0.145), 2, 1024),
    ),
    "lmsys": (
        LognormalMixture((0.1114, 0.7822, 0.1064), (2.275, 2.859, 5.714), (0.253, 1.063, 0.501), 2, 1037),
        LognormalMixture((0.4172, 0.3592, 0.2235), (3.344, 4.933, 5.83), (1.246, 0.597, 0.254), 1, 761),
    ),
    "deepseek_r1": (
        LognormalMixture((0.3488, 0.2524, 0.3988), (3.393, 5.598, 6.578), (0.719, 0.391, 1.74), 4, 55955),
        LognormalMixture((0.6038, 0.189, 0.2072), (6.168, 7.228, 8.103), (0.547, 0.173, 0.768), 30, 29564),
    ),
}
