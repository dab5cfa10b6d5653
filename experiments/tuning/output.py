"""What a tuning leaves: every trial as a table, the best ones as a page, and a figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.compare import format_figure
from experiments.plots import STYLE, line_style
from experiments.study import OBJECTIVES
from experiments.sweeps.table import value_text
from experiments.tuning.search import Trial
from experiments.tuning.spec import Goal, TuneSpec


def table(trials: Sequence[Trial], spec: TuneSpec) -> pd.DataFrame:
    """One row a trial: `trial`, what was searched, the objectives, `best`, `error`."""
    names = [goal.metric for goal in spec.objectives]
    rows = [
        {
            "trial": trial.number,
            **{field: value_text(value) for field, value in trial.values.items()},
            **dict(zip(names, trial.figures or [None] * len(names), strict=True)),
            "best": trial.best,
            "error": trial.error,
        }
        for trial in trials
    ]
    return pd.DataFrame(rows)


def best_first(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other one beats, by the first objective; a point that was tried twice once."""
    points: dict[str, Trial] = {}
    for trial in trials:
        if trial.best:
            points.setdefault(repr(trial.values), trial)
    return sorted(points.values(), key=lambda trial: (trial.figures, trial.number))


def markdown(trials: Sequence[Trial], spec: TuneSpec) -> str:
    """The best trials."""
    return "\n".join(_lines(trials, spec)) + "\n"


def _lines(trials: Sequence[Trial], spec: TuneSpec) -> Iterator[str]:
    goals = " and ".join(f"{goal.metric} ({goal.better} is better)" for goal in spec.objectives)
    failed = sum(bool(trial.error) for trial in trials)
    yield f"# {'Pareto front' if len(spec.objectives) > 1 else 'Best'} of {len(trials)} trials: {goals}"
    yield ""
    yield f"Measured: {spec.window}. Each point's figures are means over {spec.seeds} seed{'s' * (spec.seeds > 1)}."
    if failed:
        first = next(trial for trial in trials if trial.error)
        yield f"{failed} trials failed; the first one (trial {first.number}): {first.error}"
    yield ""
    titles = ["trial", *spec.search, *(goal.metric for goal in spec.objectives)]
    yield f"| {' | '.join(titles)} |"
    yield "|" + " --- |" * len(titles)
    for trial in best_first(trials):
        values = [str(value_text(trial.values[field])) for field in spec.search]
        cells = [str(trial.number), *values, *(format_figure(figure) for figure in trial.figures)]
        yield f"| {' | '.join(cells)} |"


def figure(trials: Sequence[Trial], spec: TuneSpec) -> Figure:
    """Of two objectives all points and the front; of one its value by trial, and the best so far."""
    done = [trial for trial in trials if trial.figures]
    values = np.array([trial.figures for trial in done], np.float64).reshape(len(done), len(spec.objectives))
    style = line_style(0)
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(4.6, 3.4), layout="constrained")
        axis = drawn.subplots()
        if len(spec.objectives) == 2:
            front = np.array([trial.figures for trial in best_first(trials)], np.float64).reshape(-1, 2)
            axis.scatter(values[:, 0], values[:, 1], s=16, color="#999999", label="tried")
            axis.plot(front[:, 0], front[:, 1], marker="o", markersize=4, label="Pareto front", **style)
            axis.set(xlabel=_label(spec.objectives[0]), ylabel=_label(spec.objectives[1]))
        else:
            numbers = [trial.number for trial in done]
            reach = np.minimum if spec.objectives[0].better == "lower" else np.maximum
            axis.scatter(numbers, values[:, 0], s=16, color="#999999", label="tried")
            axis.step(numbers, reach.accumulate(values[:, 0]), where="post", label="best so far", **style)
            axis.set(xlabel="trial", ylabel=_label(spec.objectives[0]))
        axis.legend()
        return drawn


def _label(goal: Goal) -> str:
    return OBJECTIVES[goal.metric].label if goal.metric in OBJECTIVES else goal.metric


def write(trials: Sequence[Trial], spec: TuneSpec, folder: Path) -> None:
    """trials.parquet, trials.csv, front.md, front.png and front.pdf."""
    frame = table(trials, spec)
    for field in spec.search:
        if frame[field].map(lambda value: isinstance(value, str)).any():
            frame[field] = frame[field].map(str)
    frame.to_parquet(folder / "trials.parquet", index=False)
    frame.to_csv(folder / "trials.csv", index=False)
    (folder / "front.md").write_text(markdown(trials, spec), encoding="utf-8")
    drawn = figure(trials, spec)
    drawn.savefig(folder / "front.png", dpi=160)
    drawn.savefig(folder / "front.pdf", metadata={"CreationDate": None})
