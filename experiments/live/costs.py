"""Which cost model a twin may have: what the server states, a calibration among the runs, a device's data sheet."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from experiments.live.server import About, LiveError
from experiments.simulated import costs_as_described
from experiments.spec import CostSpec
from policies import model_shape
from policies.model_shape import ModelShape
from simulator.costs.base import CostModel
from simulator.costs.calibration import Calibration
from simulator.costs.fitted import FittedCost
from simulator.costs.roofline import RooflineCost
from simulator.devices import DEVICES

STATED = "stated"
DEPTH = 2
"""Folders below the root in which calibrations are looked for."""
MARK = f'"{Calibration.model_fields["format"].default}"'.encode()
"""In the head of each file that `Calibration.save` writes."""


def choices(root: Path) -> dict[str, str]:
    """Names of cost models -> what a reader is told of them."""
    found = {STATED: "as the server states it"}
    found |= {f"file:{name}": f"calibration {name}" for name in _calibrations(root)}
    return found | {f"sheet:{name}": f"data sheet of {name}" for name in DEVICES}


def maker(choice: str, root: Path) -> Callable[[About], CostModel]:
    """Makes the model from what the server says of itself; raises LiveError where it cannot."""

    def make(about: About) -> CostModel:
        kind, _, name = choice.partition(":")
        if choice not in choices(root):
            raise LiveError(f"there is no cost model {choice!r} any more; choose another one")
        try:
            if kind == "file":
                return FittedCost.load(root / name)
            return _stated(about) if kind == STATED else _sheet(about, name)
        except LiveError:
            raise
        except (ValueError, OSError) as error:
            raise LiveError(f"the cost model cannot be used: {' '.join(str(error).split())}") from None

    return make


def _stated(about: About) -> CostModel:
    cost = about.engines[0].cost
    if cost is None:
        raise LiveError(
            "the server states no cost model: choose one, or start it with --set cost.kind=fitted "
            "--set cost.calibration=FILE"
        )
    return costs_as_described(cost)


def _sheet(about: About, device: str) -> CostModel:
    """A roofline of the server's model, which must be a known shape, in its own precision."""
    engine = about.engines[0]
    shape = CostSpec(model=engine.model or about.model).model
    if shape not in model_shape.PRESETS:
        raise LiveError(f"the shape of {engine.model or about.model!r} is not known here: choose a calibration")
    return RooflineCost(ModelShape.preset(shape).in_dtype(engine.dtype), DEVICES[device])


def _calibrations(root: Path) -> list[str]:
    """Files below the root that `diptych profile` wrote, by their names from there."""
    found = []
    for folder, subfolders, files in os.walk(root):
        relative = Path(folder).relative_to(root)
        subfolders[:] = [] if "run.json" in files or len(relative.parts) >= DEPTH else sorted(subfolders)
        for file in sorted(files):
            path = Path(folder) / file
            if file.endswith(".json") and file != "run.json" and not path.is_symlink() and _is_calibration(path):
                found.append((relative / file).as_posix())
    return found


def _is_calibration(path: Path) -> bool:
    try:
        with path.open("rb") as opened:
            return MARK in opened.read(200)
    except OSError:
        return False
