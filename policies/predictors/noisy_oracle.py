from __future__ import annotations

import math
from collections.abc import Mapping

from policies.predictors.oracle import Oracle
from policies.random_stream import RandomStream
from policies.registry import register
from policies.request import Request


@register("predictor", "noisy_oracle")
class NoisyOracle(Oracle):
    """The true output length times a factor drawn once a request: a predictor of a set quality. Clairvoyant.

    The factor is log-normal with median 1: its logarithm is normal with standard deviation `error` (0: the oracle
    itself; 0.5: two thirds of the predictions are within a factor of 1.65).
    """

    def __init__(self, error: float = 0.5, oracle: Mapping[int, int] | None = None, seed: int = 0) -> None:
        super().__init__(oracle)
        if error < 0:
            raise ValueError(f"error must be 0 or more, not {error}")
        self._error = error
        self._stream = RandomStream(seed, "noisy_oracle")

    def predict(self, request: Request) -> float:
        radius = math.sqrt(-2.0 * math.log(1.0 - self._stream.uniform(request.id, 0)))  # Box and Muller, 1958
        normal = radius * math.cos(2.0 * math.pi * self._stream.uniform(request.id, 1))
        return max(1.0, super().predict(request) * math.exp(self._error * normal))
