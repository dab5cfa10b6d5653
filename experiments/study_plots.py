"""The figures of the dashboard's page "Policies" on paper."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.compare import format_figure
from experiments.plots import STYLE, line_style
from experiments.series import COLOURS, wide
from experiments.study import OBJECTIVES, PANELS, PARETO, pareto

_MARKERS = "oDsX"


def pareto_figure(table: pd.DataFrame) -> Figure:
    """Throughput against latency, fairness and memory; each panel's best are joined."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        axes = figure.subplots(1, len(PARETO))
        for axis, (across, up) in zip(axes, PARETO, strict=True):
            for place, (kind, title) in enumerate(PANELS.items()):
                rows = table[table["kind"] == kind].dropna(subset=[across, up])
                if not len(rows):
                    continue
                x, y = rows[across].to_numpy(np.float64), rows[up].to_numpy(np.float64)
                best = np.flatnonzero(pareto(x, y, OBJECTIVES[across].lower_is_better, OBJECTIVES[up].lower_is_better))
                best = best[np.argsort(x[best], kind="stable")]
                style = line_style(place)
                axis.plot(x[best], y[best], **style)
                axis.scatter(x, y, s=26, color=style["color"], marker=_MARKERS[place], label=title)
            axis.set_xlabel(OBJECTIVES[across].label)
            axis.set_ylabel(OBJECTIVES[up].label)
        handles, labels = axes[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside upper center", ncols=4)
        return figure


def capacity_figure(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """What came of each load (objective -> `load_curves`): colours and marks are policies, broken lines simulated."""
    policies = sorted({policy for frame in curves.values() for policy in frame["policy"]})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        axes = figure.subplots(1, len(curves), squeeze=False)[0]
        for axis, (objective, frame) in zip(axes, curves.items(), strict=True):
            for (kind, policy), rows in frame.groupby(["kind", "policy"], sort=True):
                place, panel = policies.index(str(policy)), list(PANELS).index(str(kind))
                style = {**line_style(panel), "color": COLOURS[place % len(COLOURS)]}
                name = f"{policy}, {PANELS[str(kind)]}"
                marker = {"marker": _MARKERS[place % len(_MARKERS)], "markersize": 5}
                filled = {"markerfacecolor": "none"} if panel else {}
                axis.plot(rows["rate"], rows["value"], label=name, **style, **marker, **filled)
            if wide(np.sort(frame["value"].to_numpy(np.float64))):
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
            axis.set_xlim(left=0)
            axis.set(xlabel="requests that arrive (req/s)", ylabel=OBJECTIVES[objective].label)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3)
        return figure


def heat_figure(cells: pd.DataFrame, x: str, y: str, objective: str) -> Figure:
    """An objective over two knobs (`study.grid`), each cell with its figure."""
    of = OBJECTIVES[objective]
    values = cells.to_numpy(np.float64)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.5 + 1.1 * values.shape[1], 1.6 + 0.5 * values.shape[0]), layout="constrained")
        axis = figure.subplots()
        image = axis.imshow(
            values, cmap="cividis" if of.lower_is_better else "cividis_r", aspect="auto", origin="lower"
        )
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                axis.text(
                    column,
                    row,
                    format_figure(float(value)),
                    ha="center",
                    va="center",
                    color="white" if dark else "black",
                )
        axis.set_xticks(range(values.shape[1]), [_tick(value) for value in cells.columns])
        axis.set_yticks(range(values.shape[0]), [_tick(value) for value in cells.index])
        axis.grid(False)
        axis.set(xlabel=x, ylabel=y)
        figure.colorbar(image, ax=axis, label=of.label)
        return figure


def _tick(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
