"""Interactive figures of the page "Policies"."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dashboard import theme
from dashboard.figures import laid_out
from experiments.compare import format_figure
from experiments.series import wide
from experiments.study import OBJECTIVES, PANELS, PARETO, pareto

_SYMBOLS = ("circle", "diamond", "square", "cross")


def pareto_figure(table: pd.DataFrame) -> go.Figure:
    """Runs of a study's table: throughput against latency, fairness and memory; each panel's best are joined."""
    figure = make_subplots(rows=1, cols=len(PARETO), horizontal_spacing=0.09)
    for at, (across, up) in enumerate(PARETO, start=1):
        x_of, y_of = OBJECTIVES[across], OBJECTIVES[up]
        for place, (kind, title) in enumerate(PANELS.items()):
            rows = table[table["kind"] == kind].dropna(subset=[across, up])
            if not len(rows):
                continue
            x, y = rows[across].to_numpy(np.float64), rows[up].to_numpy(np.float64)
            colour = theme.colours()[place]
            best = np.flatnonzero(pareto(x, y, x_of.lower_is_better, y_of.lower_is_better))
            best = best[np.argsort(x[best], kind="stable")]
            figure.add_trace(
                go.Scatter(
                    x=x[best], y=y[best], mode="lines", hoverinfo="skip", showlegend=False, legendgroup=kind,
                    line={"color": colour, "width": 1.5, "dash": theme.DASHES[place], "shape": "linear"},
                ),
                row=1, col=at,
            )  # fmt: skip
            figure.add_trace(
                go.Scatter(
                    x=x, y=y, mode="markers", name=title, legendgroup=kind, showlegend=at == 1,
                    marker={"color": colour, "symbol": _SYMBOLS[place], "size": 10, "opacity": 0.85},
                    text=rows["policy"], customdata=rows["run"],
                    hovertemplate=f"<b>%{{text}}</b><br>%{{customdata}}<br>{x_of.title} %{{x:,.4g}} {x_of.unit}<br>"
                    f"{y_of.title} %{{y:,.4g}} {y_of.unit}<extra>{title}</extra>",
                ),
                row=1, col=at,
            )  # fmt: skip
        figure.update_xaxes(title_text=x_of.label + _better(across), tickformat=",~g", nticks=6, row=1, col=at)
        figure.update_yaxes(title_text=y_of.label + _better(up), tickformat=",~g", nticks=6, row=1, col=at)
    return laid_out(figure, 420)


def capacity_figure(curves: Mapping[str, pd.DataFrame]) -> go.Figure:
    """What came of each load (objective -> `load_curves`), a panel an objective: colours and marks are policies, full
    lines real and broken ones simulated."""
    figure = make_subplots(rows=1, cols=len(curves), horizontal_spacing=0.1)
    policies = sorted({policy for frame in curves.values() for policy in frame["policy"]})
    for at, (objective, frame) in enumerate(curves.items(), start=1):
        of = OBJECTIVES[objective]
        for (kind, policy), rows in frame.groupby(["kind", "policy"], sort=True):
            place, panel = policies.index(str(policy)), list(PANELS).index(str(kind))
            colour = theme.colours()[place % len(theme.colours())]
            name = f"{policy}, {PANELS[str(kind)]}"
            figure.add_trace(
                go.Scatter(
                    x=rows["rate"], y=rows["value"], mode="lines+markers", name=name, legendgroup=name,
                    showlegend=at == 1,
                    line={"color": colour, "width": 2, "dash": theme.DASHES[panel]},
                    marker={"symbol": _SYMBOLS[place % len(_SYMBOLS)] + "-open" * panel, "size": 9},
                    customdata=rows["runs"],
                    hovertemplate=f"%{{x:,.4g}} req/s: {of.title} %{{y:,.4g}} {of.unit}, %{{customdata}} run(s)"
                    f"<extra>{name}</extra>",
                ),
                row=1, col=at,
            )  # fmt: skip
        log = {"type": "log", "dtick": 1} if wide(np.sort(frame["value"].to_numpy(np.float64))) else {}
        figure.update_xaxes(title_text="requests that arrive (req/s)", rangemode="tozero", row=1, col=at)
        figure.update_yaxes(title_text=of.label, tickformat=",~g", rangemode="tozero", **log, row=1, col=at)
    names = -(-len({trace.name for trace in figure.data}) // 4)  # of the legend: about four names in each
    return laid_out(figure, 350 + 20 * names, t=24 + 20 * names)


def heat_figure(cells: pd.DataFrame, x: str, y: str, objective: str) -> go.Figure:
    """An objective over two knobs (`study.grid`), each cell with its figure; dark is good."""
    of = OBJECTIVES[objective]
    texts = [["" if np.isnan(value) else format_figure(value) for value in row] for row in cells.to_numpy(np.float64)]
    figure = go.Figure(
        go.Heatmap(
            z=cells.to_numpy(np.float64),
            x=[_text(value) for value in cells.columns],
            y=[_text(value) for value in cells.index],
            text=texts,
            texttemplate="%{text}",
            colorscale="Cividis",
            reversescale=not of.lower_is_better,
            colorbar={"title": {"text": of.unit}, "thickness": 12, "tickformat": ",~g", "outlinewidth": 0},
            xgap=2,
            ygap=2,
            hovertemplate=f"{x} %{{x}}<br>{y} %{{y}}<br>{of.title} %{{z:,.4g}} {of.unit}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text=x, type="category", showgrid=False)
    figure.update_yaxes(title_text=y, type="category", showgrid=False)
    return laid_out(figure, 160 + 46 * max(3, len(cells)), l=8, b=8, autoexpand=True)


def _better(objective: str) -> str:
    return " ← better" if OBJECTIVES[objective].lower_is_better else " better →"


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
