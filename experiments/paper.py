"""Figures as a paper takes them: the dashboard's own, at the width of a column or a page, as PDF, SVG or PNG.

Colours are Okabe and Ito's, and every line has dashes of its own, so that they are told apart with any kind of colour
vision and in print. The same data give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from experiments.plots import STYLE, latency_axis, line_style, say_if_empty
from experiments.series import LATENCY_COLUMNS, cdf, samples
from experiments.study import OBJECTIVES, pareto

COLUMN, PAGE = 3.33, 7.0
"""Inches: a column of two, and both, as most conferences have them."""
FORMATS = ("pdf", "svg", "png")
_METADATA: dict[str, dict[str, Any]] = {
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
}
_STYLE: Any = {**STYLE, "font.size": 8, "axes.titlesize": 8, "legend.fontsize": 7, "pdf.fonttype": 42}
_MARKERS = "osD^vX"


def check_format(path: Path) -> str:
    """The file's format by its name. Raises ValueError for one that there is not."""
    kind = path.suffix.lstrip(".").lower()
    if kind not in FORMATS:
        raise ValueError(f"{path}: a figure is a file that ends in {', '.join('.' + known for known in FORMATS)}")
    return kind


def save(figure: Figure, path: Path, width: float | None = None) -> None:
    """Write a figure, its height as it is to its width. Raises ValueError for a format that there is not."""
    kind = check_format(path)
    if width is not None:
        was, height = figure.get_size_inches()
        figure.set_size_inches(width, height * max(width / was, 0.7))
        if width < PAGE:
            for text in figure.findobj(Text):
                text.set_fontsize(min(text.get_fontsize(), _STYLE["font.size"]))  # type: ignore[attr-defined]
    with mpl.rc_context(_STYLE):
        figure.savefig(path, dpi=300, metadata=_METADATA[kind])


def cdf_figure(frames: Mapping[str, pd.DataFrame], columns: Sequence[str] = ("ttft_ms",)) -> Figure:
    """Distribution functions of latencies (label -> `per_request` frame), one panel a latency, side by side."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(COLUMN if len(columns) == 1 else PAGE, 2.2), layout="constrained")
        axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for axis, column in zip(axes, columns, strict=True):
            values = {label: samples(frame, column) for label, frame in frames.items()}
            for place, (label, ascending) in enumerate(values.items()):
                axis.step(*cdf(ascending), where="post", label=label, **line_style(place))
            latency_axis(axis, "x", f"{LATENCY_COLUMNS[column]} (ms)", values)
            axis.set_ylim(0, 1.01)
            say_if_empty(axis, values)
        axes[0].set_ylabel("share of requests")
        _legend(figure, axes[0])
        return figure


def curve_figure(table: pd.DataFrame, x: tuple[str, str], ys: Sequence[tuple[str, str]], log: bool = False) -> Figure:
    """Figures over a number that was varied, as latency over rate: a line a series, means over its runs with a band.

    `table`: columns `series`, the one of `x` and those of `ys`, each given with its label. The band is from the
    smallest to the largest of the runs at one place, as of several seeds.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(COLUMN if len(ys) == 1 else PAGE, 2.3), layout="constrained")
        axes = figure.subplots(1, len(ys), squeeze=False)[0]
        for axis, (column, label) in zip(axes, ys, strict=True):
            for place, (series, rows) in enumerate(table.groupby("series", sort=False)):
                _draw_curve(axis, rows.dropna(subset=[x[0], column]), x[0], column, str(series), place)
            axis.set_xlabel(x[1])
            axis.set_ylabel(label)
            if log:
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
            say_if_empty(axis, {"all": table[column].dropna().to_numpy()})
        _legend(figure, axes[0])
        return figure


def _draw_curve(axis: Axes, rows: pd.DataFrame, x: str, y: str, label: str, place: int) -> None:
    at = rows.groupby(x, sort=True)[y].agg(["mean", "min", "max"])
    style = line_style(place)
    axis.plot(at.index, at["mean"], label=label, marker=_MARKERS[place % len(_MARKERS)], markersize=3.5, **style)
    if (at["max"] > at["min"]).any():
        axis.fill_between(at.index, at["min"], at["max"], color=style["color"], alpha=0.18, linewidth=0)


def pareto_figure(table: pd.DataFrame, x: str, y: str) -> Figure:
    """Two objectives against each other, a mark a run and a colour a policy; those that no run beats are joined."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(COLUMN, 2.6), layout="constrained")
        axis = figure.subplots()
        known = table.dropna(subset=[x, y])
        across, up = OBJECTIVES[x], OBJECTIVES[y]
        best = pareto(known[x].to_numpy(float), known[y].to_numpy(float), across.lower_is_better, up.lower_is_better)
        front = known[best].sort_values(x, kind="stable")
        axis.plot(front[x], front[y], color="#777777", linewidth=1, zorder=1)
        for place, (policy, rows) in enumerate(known.groupby("policy", sort=False)):
            marker = _MARKERS[place % len(_MARKERS)]
            axis.scatter(rows[x], rows[y], s=16, color=line_style(place)["color"], marker=marker, label=str(policy))
        axis.set(xlabel=across.label, ylabel=up.label)
        _legend(figure, axis)
        return figure


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if len(handles) > 1 or (handles and labels[0]):
        wide = figure.get_size_inches()[0] > COLUMN + 1
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4 if wide else 2))
