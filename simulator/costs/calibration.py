"""What a fit leaves behind: coefficients, the ranges they were measured in, their error. Kept as JSON."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError

from policies.shapes import StepShape
from simulator.costs.base import Regime
from simulator.costs.earlier import FIRST_FORMAT

DEVICE_TERMS = (
    "step",
    "any_decode",
    "any_chunk",
    "num_decodes",
    "num_chunks",
    "chunk_tokens",
    "chunk_pairs",
    "chunk_context",
    "num_samples",
)
"""Terms of the device's time beside its curves: `step` is 1, `any_decode` and `any_chunk` 1 where the step has one; the
others are fields of StepShape."""
PREPARE_TERMS = ("step", "num_decodes", "num_chunks", "chunk_tokens")
FINISH_TERMS = ("step", "num_samples")
LOOKUP_TERMS = ("num_named", "named_blocks", "looked_up_blocks")
"""What prefix caching adds to the host's prepare, as fields of StepShape."""
RANGE_FIELDS = (
    "num_decodes",
    "decode_context",
    "max_context",
    "num_chunks",
    "chunk_tokens",
    "chunk_pairs",
    "chunk_context",
    "num_samples",
    "padded_tokens",
)
"""The sizes that must lie within what was measured."""

Part = Literal["device", "step"]
Limits = Annotated[list[int], Field(min_length=2, max_length=2)]
Coefficient = Annotated[FiniteFloat, Field(ge=0)]


class CalibrationError(ValueError):
    """A calibration that cannot be used. The message is one line and says what to do."""


def _exactly(*names: str) -> AfterValidator:
    def check(terms: dict[str, Any]) -> dict[str, Any]:
        if set(terms) != set(names):
            raise ValueError(f"must have exactly the terms {', '.join(names)}")
        return terms

    return AfterValidator(check)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Slope(_Part):
    """From a size above `above` on, until the next slope's `above`, one more adds `ns`."""

    above: int = Field(ge=0)
    ns: Coefficient


def _ascending(slopes: list[Slope]) -> list[Slope]:
    if slopes[0].above != 0 or any(a.above >= b.above for a, b in pairwise(slopes)):
        raise ValueError("must begin at 0 and ascend")
    return slopes


Curve = Annotated[list[Slope], Field(min_length=1), AfterValidator(_ascending)]


class ModeFit(_Part):
    """Coefficients of steps that ran one way, in nanoseconds a unit of each term.

    Attributes:
        context_by_size: what a token of decode context costs beside `decode_context`, by padded tokens: attention
            divides its work among a card's processors by the size of the captured batch.
        slowdown: share by which the device is slower where the load of the time before (`LoadFit`) is 1, beside 0.
        usual_load: that load where the other prices hold.
    """

    num_samples: int = Field(ge=1)
    num_finish_samples: int = Field(ge=0)  # fewer: what follows the last step of a busy time is not known
    padded_tokens: Curve
    decode_context: Curve
    max_context: Curve
    context_by_size: Curve
    device: Annotated[dict[str, Coefficient], _exactly(*DEVICE_TERMS)]
    prepare: Annotated[dict[str, Coefficient], _exactly(*PREPARE_TERMS)]
    finish: Annotated[dict[str, Coefficient], _exactly(*FINISH_TERMS)]
    slowdown: Coefficient = 0.0
    usual_load: Coefficient = 0.0


class LoadFit(_Part):
    """A card at its power limit lowers its clocks: after much arithmetic, steps take longer for a while.

    The load is a mean over the time before a step, weighted exponentially: of 0 where the device was idle, and of the
    rate of padded tokens elsewhere, as a share of `full_rate`.
    """

    time_constant_ns: int = Field(gt=0)
    full_rate: float = Field(gt=0)  # padded tokens a nanosecond


class DelayFit(_Part):
    """The host is late now and then, by more than it has to spare: the mean of that, by what it has to spare."""

    spare_ns: Annotated[list[int], Field(min_length=1)]
    mean_ns: Annotated[list[Coefficient], Field(min_length=1)]


class SwapFit(_Part):
    """What copying KV to host memory and back takes: nanoseconds a step that copies in one direction, and a token of KV
    in each. `overlaps`: it was seen to go on beside the steps; else a step takes as much longer."""

    num_samples: int = Field(ge=1)
    copies: Coefficient
    swapped_out: Coefficient
    swapped_in: Coefficient
    overlaps: bool = False


class LookupFit(_Part):
    """What prefix caching adds to the host's prepare: nanoseconds a prompt that is named, a block of it, and a block
    that is looked up and hit or entered.

    Attributes:
        held_out: mean relative error of prepare, on steps that the fit had not seen.
        without: the same without these prices.
    """

    num_samples: int = Field(ge=1)
    num_named: Coefficient
    named_blocks: Coefficient
    looked_up_blocks: Coefficient
    held_out: FiniteFloat
    without: FiniteFloat


class MeasuredRange(_Part):
    """Smallest and largest of each size that was measured, for one way to run and one kind of step."""

    graph: bool
    regime: Regime
    sizes: Annotated[dict[str, Limits], _exactly(*RANGE_FIELDS)]  # name -> [smallest, largest]

    def holds(self, shape: StepShape) -> bool:
        return all(low <= getattr(shape, name) <= high for name, (low, high) in self.sizes.items())


class HeldOutError(_Part):
    """Error on samples that a fit had not seen. Fractions: |predicted - measured| / measured, and `bias`, the sum of
    what was predicted over the sum of what was measured, minus one. `step` is all three parts together."""

    regime: Regime
    part: Part
    num_samples: int = Field(ge=1)
    mean: FiniteFloat
    p50: FiniteFloat
    p90: FiniteFloat
    bias: FiniteFloat
    quantiles: list[FiniteFloat] = []
    """Evenly spaced ones, from the lowest to the highest, of (predicted - measured) / measured; none in calibrations of
    earlier versions."""


class Calibration(_Part):
    """A fitted cost model in full.

    `decode` is of captured steps of decodes alone, `chunked` of captured ones with chunks; `other` of eager ones,
    and of captured ones of which too few were measured for a fit of their own.
    """

    format: Literal["diptych-calibration-2"] = "diptych-calibration-2"
    provenance: dict[str, JsonValue]
    """What was measured: device, model, software, date, as the caller states them."""
    decode: ModeFit | None
    chunked: ModeFit | None
    other: ModeFit | None
    under_load: LoadFit | None = None
    """None where steps do not depend on those before them."""
    delay: DelayFit | None = None
    """None where it was not measured."""
    swap: SwapFit | None = None
    """None where no step of the measurement swapped anything."""
    lookups: LookupFit | None = None
    """None where no step of the measurement named a prompt's blocks: they cost nothing."""
    ranges: list[MeasuredRange]
    held_out: list[HeldOutError]
    """Empty where there were too few samples to hold any out."""

    def save(self, path: Path) -> None:
        """Write JSON, from which `load` makes an equal one."""
        path.write_text(json.dumps(self.model_dump(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote. Raises CalibrationError for a file that is missing, or not one."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CalibrationError(
                f"calibration {path} cannot be read ({error.strerror}); make one with `diptych profile`"
            ) from error
        except ValueError as error:
            raise CalibrationError(f"calibration {path} is not JSON ({error}); make it anew") from error
        found = content.get("format") if isinstance(content, dict) else None
        if found == FIRST_FORMAT:
            raise CalibrationError(f"calibration {path} is of an earlier version; make it anew with `diptych profile`")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise CalibrationError(f"calibration {path}: {where}: {first['msg']}; make it anew") from None
