"""Interactive figures, from the same series that `experiments.plots` draws."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from experiments.series import COLOURS, LATENCY_COLUMNS, STATE_COLUMNS, cdf, over_time, samples, wide

_DASHES = ("solid", "dash", "dot", "dashdot")


def latency_figure(frames: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Distribution functions of TTFT, TPOT and E2E (label -> `per_request` frame), runs overlaid."""
    figure = make_subplots(rows=1, cols=3, shared_yaxes=True, horizontal_spacing=0.04)
    for at, (column, title) in enumerate(LATENCY_COLUMNS.items(), start=1):
        values = {label: samples(frame, column) for label, frame in frames.items()}
        for place, (label, ascending) in enumerate(values.items()):
            x, y = cdf(ascending)
            hover = f"%{{y:.1%}} of requests within %{{x:,.4g}} ms<extra>{title}</extra>"
            figure.add_trace(_line(label, place, x, y, at == 1, hover), row=1, col=at)
        merged = np.sort(np.concatenate([*values.values(), np.zeros(0)]))
        axis = {"type": "log", "dtick": 1} if wide(merged) else {"rangemode": "tozero"}
        figure.update_xaxes(title_text=f"{title} (ms)", tickformat=",~g", **axis, row=1, col=at)
    figure.update_yaxes(range=[0, 1.01])
    figure.update_yaxes(title_text="share of requests", row=1, col=1)
    return _laid_out(figure, 360)


def timeline_figure(frames: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Running and waiting requests and KV blocks in use over time (label -> `timeline` frame), runs overlaid."""
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.05)
    for at, (column, title) in enumerate(STATE_COLUMNS.items(), start=1):
        for place, (label, frame) in enumerate(frames.items()):
            if len(frame):
                spans = over_time(frame, column)
                hover = f"%{{y:,.4g}} {title} at %{{x:,.4g}} s<extra></extra>"
                figure.add_trace(_line(label, place, spans["t_s"], spans["mean"], at == 1, hover), row=at, col=1)
        figure.update_yaxes(title_text=title, rangemode="tozero", row=at, col=1)
    figure.update_xaxes(title_text="time since the run began (s)", row=3, col=1)
    return _laid_out(figure, 620)


def _line(
    label: str, place: int, x: np.ndarray | pd.Series, y: np.ndarray | pd.Series, in_legend: bool, hover: str
) -> go.Scatter:
    style = {"color": COLOURS[place % len(COLOURS)], "dash": _DASHES[place % len(_DASHES)], "width": 2, "shape": "hv"}
    return go.Scatter(
        x=x, y=y, mode="lines", name=label, legendgroup=label, showlegend=in_legend, line=style, hovertemplate=hover
    )


def _laid_out(figure: go.Figure, height: int) -> go.Figure:
    legend = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0}
    return figure.update_layout(height=height, margin={"l": 10, "r": 10, "t": 30, "b": 10}, legend=legend)
