"""What a cost model is: sizes of a step in, nanoseconds out."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from policies.shapes import StepShape

Regime = Literal["decode", "prefill", "mixed"]


class StepCost(NamedTuple):
    """Durations of one step's three parts, in whole nanoseconds.

    With `lag=0` a step takes their sum. With `lag=1` the host parts of one step overlap the device's work on another.
    """

    prepare_ns: int
    """Host: from the call of plan() until the step is launched."""
    device_ns: int
    finish_ns: int
    """Host: from when the result is known until the host can plan again."""

    @property
    def total_ns(self) -> int:
        return self.prepare_ns + self.device_ns + self.finish_ns


class CostModel(Protocol):
    """Turns the shape of a step into its cost. Pure: the same shape costs the same, always.

    Serves as a `policies.contract.CostModel` too.
    """

    def cost(self, shape: StepShape) -> StepCost:
        """The three parts, none of them negative."""
        ...

    def step_ns(self, shape: StepShape) -> int:
        """Host and device together, in nanoseconds."""
        ...

    def inside(self, shape: StepShape) -> bool:
        """Whether the prediction for this shape lies inside what was measured."""
        ...

    def describe(self) -> dict[str, object]:
        """What it is and where its numbers come from, for run.json: plain JSON values."""
        ...


def predicted(costs: CostModel) -> CostModel:
    """What policies are told of a cost model: itself, or where it draws at random (`simulator.costs.drawn`) what it
    draws around."""
    return getattr(costs, "around", costs)


def regime(shape: StepShape) -> Regime:
    """Which kinds of work the step holds."""
    if not shape.num_chunks:
        return "decode"
    return "mixed" if shape.num_decodes else "prefill"


def whole_ns(value: float) -> int:
    """A duration that is not negative, rounded half up."""
    return int(value + 0.5)
