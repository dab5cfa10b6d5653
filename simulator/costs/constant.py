"""Costs by definition, for checks against queueing theory and for experiments on policies alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from policies.shapes import StepShape
from simulator.costs.base import StepCost, whole_ns


@dataclass(frozen=True, slots=True)
class ConstantCost:
    """Every step takes `ns` on the device, whatever is in it; the host takes no time. Raises ValueError if negative."""

    ns: int

    def __post_init__(self) -> None:
        if isinstance(self.ns, bool) or not isinstance(self.ns, int) or self.ns < 0:
            raise ValueError(f"ns must be a whole number of nanoseconds, at least 0, not {self.ns!r}")

    def cost(self, shape: StepShape) -> StepCost:
        return StepCost(0, self.ns, 0)

    def step_ns(self, shape: StepShape) -> int:
        return self.ns

    def inside(self, shape: StepShape) -> bool:
        """Always: nothing is predicted, so nothing can be outside."""
        return True

    def describe(self) -> dict[str, object]:
        return {"kind": "constant", **asdict(self)}


@dataclass(frozen=True, slots=True)
class LinearCost:
    """`base_ns`, and so much a padded token and a token of context (decodes' and chunks'); the host takes no time.

    Raises ValueError for a negative coefficient.
    """

    base_ns: float
    per_token_ns: float = 0.0
    per_context_ns: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of nanoseconds, at least 0, not {value!r}")

    def cost(self, shape: StepShape) -> StepCost:
        return StepCost(0, self.step_ns(shape), 0)

    def step_ns(self, shape: StepShape) -> int:
        context = shape.decode_context + shape.chunk_context
        return whole_ns(self.base_ns + self.per_token_ns * shape.padded_tokens + self.per_context_ns * context)

    def inside(self, shape: StepShape) -> bool:
        """Always: nothing is predicted, so nothing can be outside."""
        return True

    def describe(self) -> dict[str, object]:
        return {"kind": "linear", **asdict(self)}
