"""A tuning as a specification: a run, which of its fields are searched, and what is wanted of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.sweeps.spec import Measure, SloMs, Window
from experiments.workloads.spec import Seed


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(_Part):
    """Numbers from `low` to `high`, both among them.

    Attributes:
        step: between them; None: any real number, of whole bounds any whole one.
        log: searched by ratios: as many trials from 1 to 10 as from 10 to 100.
    """

    low: Annotated[int, Field(strict=True)] | Annotated[float, Field(allow_inf_nan=False)]
    high: Annotated[int, Field(strict=True)] | Annotated[float, Field(allow_inf_nan=False)]
    step: Annotated[int, Field(strict=True, ge=1)] | Annotated[float, Field(gt=0)] | None = None
    log: bool = False

    @model_validator(mode="after")
    def _a_range(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log is for ranges above 0 without a step")
        return self

    @property
    def whole(self) -> bool:
        """Whether its numbers are whole."""
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)


class Goal(_Part):
    """A figure, of the columns of a sweep's results, and which way is better."""

    metric: Annotated[str, Field(min_length=1)]
    better: Literal["lower", "higher"]


class TuneSpec(_Part):
    """A tuning.

    Attributes:
        base: the run, with the fields of `diptych run` and `simulate`; or the path of such a file.
        panel: `sim` or `real`.
        search: dotted field -> a `Range`, or a list of values to choose from; of a policy's knobs as in a sweep.
        objectives: one or two.
        trials: how many points are tried.
        at_once: how many are chosen before the first of them has ended. It changes which points are tried; how many
            processes there are does not.
        seeds: of the runs of each point, whose mean counts.
        seed: of the search.
        window, slo: how runs are measured, as in a sweep.
    """

    base: dict[str, Any] | Annotated[str, Field(min_length=1)]
    panel: Literal["sim", "real"] = "sim"
    search: Annotated[dict[str, Range | Annotated[tuple[Any, ...], Field(min_length=1)]], Field(min_length=1)]
    objectives: Annotated[tuple[Goal, ...], Field(min_length=1, max_length=2)]
    trials: Annotated[int, Field(strict=True, ge=1, le=100_000)] = 50
    at_once: Annotated[int, Field(strict=True, ge=1, le=1000)] = 4
    seeds: Annotated[int, Field(strict=True, ge=1)] = 1
    seed: Seed = 0
    window: Window = Window()
    slo: SloMs = {}

    @property
    def measure(self) -> Measure:
        """How runs are measured."""
        return Measure(window=self.window, slo=self.slo)
