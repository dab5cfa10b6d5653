"""A calibration made anew from the steps that were measured for it, after the fit has changed: no device is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from experiments.spec import SpecError
from simulator.costs.fitted import FittedCost
from simulator.costs.fitting import fit
from simulator.costs.samples import samples_from_steps

DESIGN_SHARE = 0.7
"""Of a profile's time, for the rounds of its design; the rest is a trace's."""


def refit(calibration: Path) -> FittedCost:
    """From the Parquet file of the same name, and the provenance that the calibration of any format states.

    Profiles of before their trace's beginning was noted are taken to have kept to the design's share of the time.
    Raises SpecError where either file is missing, or is not one.
    """
    steps_path = calibration.with_suffix(".parquet")
    try:
        provenance = json.loads(calibration.read_text(encoding="utf-8"))["provenance"]
        steps = pd.read_parquet(steps_path)
        fallback = int(steps["plan_ns"].min() + DESIGN_SHARE * provenance["seconds"] * 1e9)
        serving_from = provenance.get("serving_from_ns", fallback)
        return fit(
            samples_from_steps({str(name): column.to_numpy() for name, column in steps.items()}, serving_from),
            provenance,
        )
    except (OSError, KeyError, ValueError) as error:
        said = " ".join(str(error).split())
        raise SpecError(f"{calibration} cannot be fitted anew: {said}; profile again") from error
