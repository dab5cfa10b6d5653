"""Figures of runs, for paper and screen. Each takes data frames, label -> frame, and gives a matplotlib Figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.compare import Comparison
from experiments.metrics import per_request
from experiments.series import (
    COLOURS,
    LATENCY_COLUMNS,
    STATE_COLUMNS,
    cdf,
    matched,
    over_time,
    quantile_differences,
    samples,
    wide,
)
from experiments.timeline import timeline

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e0e0e0",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "diptych",  # ids inside an SVG come from it: the same data give the same bytes
    "svg.fonttype": "path",
}
_DASHES = ("solid", (0, (4, 1.5)), (0, (1, 1)), "dashdot")


def latency_figure(frames: Mapping[str, pd.DataFrame], difference: bool = False) -> Figure:
    """Distribution functions of TTFT, TPOT and E2E (`per_request` frames), runs overlaid.

    `difference`: below them, how far each percentile of the second run is from the first one's.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 5.2 if difference else 3.2), layout="constrained")
        rows = figure.subplots(
            2 if difference else 1, 3, sharey="row", squeeze=False, height_ratios=[2, 1][: 1 + difference]
        )
        for at, (column, title) in enumerate(LATENCY_COLUMNS.items()):
            axis, values = rows[0, at], {label: samples(frame, column) for label, frame in frames.items()}
            for place, (label, ascending) in enumerate(values.items()):
                x, y = cdf(ascending)
                axis.step(x, y, where="post", label=label, **line_style(place))
            latency_axis(axis, "x", f"{title} (ms)", values)
            axis.set_ylim(0, 1.01)
            say_if_empty(axis, values)
            if difference:
                _draw_difference(rows[1, at], title, *list(values.values())[:2])
        rows[0, 0].set_ylabel("share of requests")
        if difference:
            rows[1, 0].set_ylabel("difference (%)")
        _legend(figure, rows[0, 0])
        return figure


def _draw_difference(axis: Axes, title: str, a: np.ndarray, b: np.ndarray) -> None:
    percentiles, difference = quantile_differences(a, b)
    axis.axhline(0, color="#555555", linewidth=1)
    axis.plot(percentiles, 100 * difference, **line_style(1))
    axis.set_xlabel(f"percentile of {title}")
    axis.set_xlim(0, 100)
    say_if_empty(axis, {"difference": difference})


def timeline_figure(frames: Mapping[str, pd.DataFrame]) -> Figure:
    """Running and waiting requests and KV blocks in use over time (`timeline` frames), runs overlaid."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 6), layout="constrained")
        axes = figure.subplots(3, 1, sharex=True)
        for axis, (column, title) in zip(axes, STATE_COLUMNS.items(), strict=True):
            for place, (label, frame) in enumerate(frames.items()):
                if len(frame):
                    _draw_state(axis, frame, column, label, place)
            axis.set_ylabel(title)
            axis.set_ylim(bottom=0)
            axis.margins(x=0.01)
            say_if_empty(axis, {label: frame[column].to_numpy() for label, frame in frames.items()})
        axes[-1].set_xlabel("time since the run began (s)")
        _legend(figure, axes[0])
        return figure


def scatter_figure(a: pd.DataFrame, b: pd.DataFrame, label_a: str, label_b: str) -> Figure:
    """Each request's TTFT, TPOT and E2E in run b over those in run a (`per_request` frames), with the diagonal."""
    done = a[a["completed"]].merge(b[b["completed"]], on="request_id", suffixes=("_a", "_b"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        axes = figure.subplots(1, 3)
        for axis, (column, title) in zip(axes, LATENCY_COLUMNS.items(), strict=True):
            pairs = done[[f"{column}_a", f"{column}_b"]].dropna().to_numpy(np.float64)
            values = {"both": np.sort(pairs.ravel())}
            alpha = float(np.clip(12 / np.sqrt(max(len(pairs), 1)), 0.05, 0.6))
            axis.scatter(*pairs.T, s=9, color=COLOURS[0], alpha=alpha, linewidths=0, rasterized=len(pairs) > 2000)
            if len(pairs):
                ends = (values["both"][0], values["both"][-1])
                axis.plot(ends, ends, color="#555555", linewidth=1, label="no error")
            latency_axis(axis, "x", label_a, values)
            latency_axis(axis, "y", label_b, values)
            axis.set_title(f"{title} (ms), {len(pairs):,} requests")
            axis.set_box_aspect(1)
            say_if_empty(axis, values)
        return figure


def save_figures(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write the figures of a comparison into a folder as PNG and SVG; the same runs give the same bytes.

    Returns the paths. Raises OSError where the folder cannot be written, RunError for records that cannot be read.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    a, b = comparison.a, comparison.b
    labels = (a.label, b.label) if a.label != b.label else (f"{a.label} 1", f"{b.label} 2")
    runs = dict(zip(labels, (a, b), strict=True))
    requests = {label: per_request(run) for label, run in runs.items()}
    both = matched(*requests.values())
    compared = dict(zip(labels, both, strict=True)) if len(both[0]) else requests
    figures = {
        "latency_cdf": latency_figure(compared, difference=True),
        "timeline": timeline_figure({label: timeline(run) for label, run in runs.items() if run.has_steps}),
        "requests": scatter_figure(requests[labels[0]], requests[labels[1]], labels[0], labels[1]),
    }
    paths = []
    for name, figure in figures.items():
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            path = folder / f"{name}.{suffix}"
            with mpl.rc_context(STYLE):
                figure.savefig(path, dpi=150, metadata=metadata)
            paths.append(path)
    return paths


def _draw_state(axis: Axes, frame: pd.DataFrame, column: str, label: str, place: int) -> None:
    spans = over_time(frame, column)
    style = line_style(place)
    axis.step(spans["t_s"], spans["mean"], where="post", label=label, **style)
    if len(spans) < len(frame):  # thinned: the line is a mean over each span, the band its extremes
        axis.fill_between(
            spans["t_s"], spans["low"], spans["high"], step="post", color=style["color"], alpha=0.15, linewidth=0
        )


def latency_axis(axis: Axes, which: str, text: str, values: Mapping[str, np.ndarray]) -> None:
    """An axis from zero, or logarithmic where the values span decades."""
    merged = np.sort(np.concatenate([*values.values(), np.zeros(0)]))
    target = axis.xaxis if which == "x" else axis.yaxis
    if wide(merged):
        axis.set(**{f"{which}scale": "log", f"{which}lim": (merged[0] / 1.3, merged[-1] * 1.3)})
    else:
        axis.set(**{f"{which}lim": (0, merged[-1] * 1.05 if len(merged) and merged[-1] > 0 else 1)})
        target.set_major_locator(mpl.ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    target.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    target.set_minor_formatter(mpl.ticker.NullFormatter())
    target.set_label_text(text)


def line_style(place: int) -> dict[str, Any]:
    """Colour and dashes: runs are told apart in black and white too."""
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": _DASHES[place % len(_DASHES)], "linewidth": 1.3}


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 3))


def say_if_empty(axis: Axes, values: Mapping[str, np.ndarray]) -> None:
    if not any(len(v) for v in values.values()):
        axis.text(0.5, 0.5, "no data", transform=axis.transAxes, ha="center", va="center", color="#777777")
