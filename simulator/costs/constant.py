"""Costs by definition, for checks against queueing theory and for experiments on policies alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from policies.shapes import StepShape
from simulator.costs.base import StepCost, whole_ns


@dataclass(frozen=True, slots=True)
class ConstantCost:
    """Every step takes `ns` on the device, whatever it computes, and `swap_ns_per_token` for each token of KV that is
    copied to or from host memory before it; the host takes no time. Raises ValueError if negative."""

    ns: int
    swap_ns_per_token: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a whole number of nanoseconds, at least 0, not {value!r}")

    def cost(self, shape: StepShape) -> StepCost:
        return StepCost(0, self.step_ns(shape), 0)

    def step_ns(self, shape: StepShape) -> int:
        return self.ns + self.swap_ns_per_token * (shape.swapped_out + shape.swapped_in)

    def inside(self, shape: StepShape) -> bool:
        """Always: nothing is predicted, so nothing can be outside."""
        return True

    def describe(self) -> dict[str, object]:
        return {"kind": "constant", **asdict(self)}


@dataclass(frozen=True, slots=True)
class LinearCost:
    """`base_ns`, and so much a padded token, a token of context (decodes' and chunks') and a token of KV copied to or
    from host memory; the host takes no time.

    Raises ValueError for a negative coefficient.
    """

    base_ns: float
    per_token_ns: float = 0.0
    per_context_ns: float = 0.0
    per_swapped_ns: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of nanoseconds, at least 0, not {value!r}")

    def cost(self, shape: StepShape) -> StepCost:
        return StepCost(0, self.step_ns(shape), 0)

    def step_ns(self, shape: StepShape) -> int:
        context = shape.decode_context + shape.chunk_context
        swapped = self.per_swapped_ns * (shape.swapped_out + shape.swapped_in)
        return whole_ns(
            self.base_ns + self.per_token_ns * shape.padded_tokens + self.per_context_ns * context + swapped
        )

    def inside(self, shape: StepShape) -> bool:
        """Always: nothing is predicted, so nothing can be outside."""
        return True

    def describe(self) -> dict[str, object]:
        return {"kind": "linear", **asdict(self)}
