"""The search: an optimiser proposes points, each is run as cells of a sweep, and it is told what came of them.

The optimiser is Optuna's: for one objective a tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011), for two
its multiobjective form (Ozaki et al., JAIR 73, 2022). It is seeded, and points are chosen in rounds of `at_once`, so a
search is a function of its specification: one that was stopped is gone through again, and finds the runs that had ended
in its folder. A point that fails is told as such and the search goes on.
"""

from __future__ import annotations

import importlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.spec import SpecError
from experiments.sweeps.cells import Cell, checked, read_base, read_sweep
from experiments.sweeps.running import Runner, run_cells
from experiments.sweeps.yaml_lines import Lines, read_yaml
from experiments.tuning.spec import Range, TuneSpec


@dataclass(frozen=True)
class Trial:
    """A point that was tried.

    Attributes:
        values: field -> value.
        figures: of each objective, the mean over the seeds; empty where a run failed.
        error: why, in that case.
        best: whether no other point beats it: on the Pareto front, or of one objective the best.
    """

    number: int
    values: dict[str, Any]
    figures: tuple[float, ...]
    error: str = ""
    best: bool = False


@dataclass(frozen=True)
class Tuning:
    """A tuning that can be run: its specification, with the base as fields."""

    spec: TuneSpec
    base: dict[str, Any]
    origin: str


def read_tuning(source: str | Path | Mapping[str, Any]) -> Tuning:
    """A tuning from a YAML file or from a dictionary of the same fields. Raises SpecError with file, line and field.

    The first choice or the lower end of each range is checked as a run.
    """
    if isinstance(source, Mapping):
        content, lines, folder = dict(source), Lines("the tuning"), Path()
    else:
        content, lines = read_yaml(Path(source))
        folder = Path(source).parent
    spec = checked(TuneSpec, content, lines)
    base, base_lines, prefix = read_base(content["base"], lines, folder)
    tuning = Tuning(spec, base, lines.origin)
    first = {field: of.low if isinstance(of, Range) else of[0] for field, of in spec.search.items()}
    try:
        read_sweep({"base": base})
    except SpecError as error:
        raise SpecError(f"{base_lines.at(prefix)}: {error}") from None
    for field, value in first.items():
        try:
            cells_of(tuning, {field: value} if "." not in field else first)
        except SpecError as error:
            raise SpecError(f"{lines.at(('search', field))}: {error}") from None
    return tuning


def cells_of(tuning: Tuning, values: Mapping[str, Any]) -> list[Cell]:
    """The runs of a point, one a seed. Raises SpecError where they cannot be."""
    variables = {"grid": {field: [value] for field, value in values.items()}, "seeds": tuning.spec.seeds}
    return read_sweep({"base": tuning.base, "panel": tuning.spec.panel, "variables": variables}).cells


def search(
    tuning: Tuning, folder: Path, runner: Runner, say: Callable[[Trial], None] = lambda trial: None
) -> list[Trial]:
    """Run a tuning's trials; all of them, in the order of their numbers, with the best marked."""
    optuna = _optuna()
    spec = tuning.spec
    directions = ["minimize" if goal.better == "lower" else "maximize" for goal in spec.objectives]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=spec.seed, constant_liar=spec.at_once > 1)
    study = optuna.create_study(directions=directions, sampler=sampler)
    trials: list[Trial] = []
    while len(trials) < spec.trials:
        asked = [study.ask() for _ in range(min(spec.at_once, spec.trials - len(trials)))]
        points = [{field: _suggest(trial, field, of) for field, of in spec.search.items()} for trial in asked]
        for trial, tried in zip(asked, _tried(tuning, points, len(trials), folder, runner), strict=True):
            if tried.error:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, list(tried.figures))
            trials.append(tried)
            say(tried)
    return _marked(trials, spec)


def _suggest(trial: Any, field: str, of: Range | tuple[Any, ...]) -> Any:
    if not isinstance(of, Range):
        texts = [json.dumps(value, sort_keys=True) for value in of]  # choices have to be plain values
        return json.loads(trial.suggest_categorical(field, texts))
    if of.whole:
        return trial.suggest_int(field, of.low, of.high, step=of.step or 1, log=of.log)
    return float(f"{trial.suggest_float(field, of.low, of.high, step=of.step, log=of.log):.6g}")


def _tried(tuning: Tuning, points: Sequence[dict[str, Any]], first: int, folder: Path, runner: Runner) -> list[Trial]:
    """A round of points: all their runs together, so that every process has something to do."""
    cells: dict[int, list[Cell]] = {}
    errors = {}
    for number, values in enumerate(points):
        try:
            cells[number] = cells_of(tuning, values)
        except SpecError as wrong:
            errors[number] = str(wrong)
    wanted = {cell.name: cell for of in cells.values() for cell in of}  # a point may be proposed twice
    notes = run_cells(list(wanted.values()), folder, tuning.spec.measure, runner=runner) if wanted else {}
    found = []
    for number, values in enumerate(points):
        mine = [notes[cell.name] for cell in cells.get(number, ())]
        error = errors.get(number) or next((note["error"] for note in mine if note["status"] != "ok"), "")
        figures: tuple[float, ...] = ()
        if not error:
            figures = tuple(_mean(mine, goal.metric) for goal in tuning.spec.objectives)
            missing = [g.metric for g, of in zip(tuning.spec.objectives, figures, strict=True) if math.isnan(of)]
            error = f"its runs have no {missing[0]}" if missing else ""
        found.append(Trial(first + number, values, () if error else figures, error))
    return found


def _mean(notes: Sequence[Mapping[str, Any]], metric: str) -> float:
    """Over the seeds; nan where one of them has no such figure. Raises SpecError where runs have none of the name."""
    if any(metric not in note["figures"] for note in notes):
        known = ", ".join(sorted(notes[0]["figures"]))
        raise SpecError(f"objectives: runs have no figure {metric}; they have {known}")
    values = [note["figures"][metric] for note in notes]
    return math.nan if None in values else sum(values) / len(values)


def _marked(trials: list[Trial], spec: TuneSpec) -> list[Trial]:
    """Which points no other one beats: none is at least as good in everything and better in something."""
    signs = [1 if goal.better == "lower" else -1 for goal in spec.objectives]
    costs = {t.number: tuple(sign * of for sign, of in zip(signs, t.figures, strict=True)) for t in trials if t.figures}

    def beaten(cost: tuple[float, ...]) -> bool:
        return any(
            other != cost and all(mine >= theirs for mine, theirs in zip(cost, other, strict=True))
            for other in costs.values()
        )

    return [
        Trial(t.number, t.values, t.figures, t.error, t.number in costs and not beaten(costs[t.number])) for t in trials
    ]


def _optuna() -> Any:
    try:
        optuna = importlib.import_module("optuna")
    except ImportError:
        raise SpecError("tuning needs the package optuna; pip install 'diptych[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
