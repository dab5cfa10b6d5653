"""A sweep as a specification: a run, what is varied of it, and how its runs are measured."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from experiments.metrics import COLUMNS
from experiments.workloads.spec import Positive, Seed

Panel = Literal["real", "sim"]
METRICS = ("request_throughput", "output_throughput", "mean_ttft_ms", "p99_ttft_ms", "p99_tpot_ms", "p99_e2el_ms")
"""Figures of the summary where nobody says; results.parquet has all of them."""
SEED_FIELDS = ("workload.seed", "seed")
"""What a seed sets, as --seed does."""


def _latencies(slo: dict[str, float]) -> dict[str, float]:
    for name in slo:
        if name not in COLUMNS:
            raise ValueError(f"there is no objective {name!r}; give some of {', '.join(COLUMNS)}, in milliseconds")
    return slo


SloMs = Annotated[dict[str, Positive], AfterValidator(_latencies)]
"""Latency -> milliseconds that no request of goodput passes."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Window(_Part):
    """Which requests count, by their order of arrival: without those of the warm-up and of the drain.

    Attributes:
        skip_first, skip_last: shares of the arrivals that are left out at either end.
    """

    skip_first: Annotated[float, Field(ge=0, lt=1)] = 0.0
    skip_last: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _something_left(self) -> Window:
        if self.skip_first + self.skip_last >= 1:
            raise ValueError("skip_first and skip_last together leave nothing; their sum must be below 1")
        return self

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return not self.skip_first and not self.skip_last

    def __str__(self) -> str:
        if self.whole:
            return "every request counts, those of warm-up and drain too"
        return (
            f"the first {self.skip_first:.4g} and the last {self.skip_last:.4g} of the arrivals do not count (warm-up "
            "and drain); rates are taken over the time between"
        )


class Measure(_Part):
    """How a run becomes a row of figures.

    Attributes:
        window: which requests count.
        slo: objectives for goodput, in milliseconds, for all requests.
    """

    window: Window = Window()
    slo: SloMs = {}


class Variables(_Part):
    """What is varied, by dotted field; a policy's knobs stand below its role (`policies.scheduler.chunk_size`).

    Attributes:
        grid: field -> values; every combination is a cell.
        zip: field -> values, which go together, position by position; several such groups are crossed.
        seeds: a number of seeds from 0, or a list of them; each sets the workload's and the run's.
    """

    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    zip: tuple[Annotated[dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]], Field(min_length=1)], ...] = ()
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] | None = None

    @field_validator("zip", mode="before")
    @classmethod
    def _groups(cls, value: Any) -> Any:
        return (value,) if isinstance(value, Mapping) else value

    @field_validator("seeds", mode="before")
    @classmethod
    def _first_seeds(cls, value: Any) -> Any:
        return tuple(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _fitting(self) -> Variables:
        for group in self.zip:
            lengths = {field: len(values) for field, values in group.items()}
            if len(set(lengths.values())) > 1:
                told = ", ".join(f"{field} has {length}" for field, length in lengths.items())
                raise ValueError(f"zip: fields of one group need as many values each; {told}")
        for field, times in Counter([*self.grid, *(field for group in self.zip for field in group)]).items():
            if times > 1:
                raise ValueError(f"{field} is varied twice")
            if self.seeds is not None and field in SEED_FIELDS:
                raise ValueError(f"{field} is varied twice: seeds sets it too")
        for field, values in (*self.grid.items(), ("seeds", self.seeds or ())):
            texts = [json.dumps(value, sort_keys=True, default=str) for value in values]
            if len(set(texts)) < len(texts):
                twice = next(text for text in texts if texts.count(text) > 1)
                raise ValueError(f"{field} has the value {twice} twice")
        return self

    @property
    def fields(self) -> list[str]:
        """Everything that is varied but the seed, in the order of the file."""
        return [*self.grid, *(field for group in self.zip for field in group)]

    def places(self, field: str) -> Iterator[tuple[str | int, ...]]:
        """Where the values of a field may stand in the file."""
        if field in self.grid:
            yield ("variables", "grid", field)
        for number, group in enumerate(self.zip):
            if field in group:
                yield ("variables", "zip", number, field)
                yield ("variables", "zip", field)


class SweepSpec(_Part):
    """A sweep.

    Attributes:
        base: the run that is varied, with the fields of `diptych run` and `simulate`; or the path of such a file, as
            seen from this one.
        panel: `real`, `sim` or `both`; None: the base's `target`, the simulation where it says nothing.
        variables: what is varied.
        window, slo: how runs are measured; see `Measure`.
        metrics: figures of the summary, of the columns of results.parquet.
        compare: a varied field; its other values are compared with its first one, in pairs of cells that are the same
            in all else: same seed, same arrivals.
    """

    base: dict[str, Any] | Annotated[str, Field(min_length=1)]
    panel: Literal["real", "sim", "both"] | None = None
    variables: Variables = Variables()
    window: Window = Window()
    slo: SloMs = {}
    metrics: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    compare: str | None = None

    @model_validator(mode="after")
    def _comparable(self) -> SweepSpec:
        known = self.variables.fields
        if self.compare is not None and self.compare not in known:
            raise ValueError(f"compare: {self.compare} is not varied; varied are {', '.join(known) or 'no fields'}")
        return self

    @property
    def measure(self) -> Measure:
        """How runs are measured."""
        return Measure(window=self.window, slo=self.slo)

    @property
    def shown(self) -> tuple[str, ...]:
        """The figures of the summary."""
        return self.metrics or (*METRICS, *(["request_goodput"] if self.slo else []))
