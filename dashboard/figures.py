"""Interactive figures of the page "Compare", from the same series that `experiments.plots` draws on paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dashboard import theme
from experiments.series import (
    LATENCY_COLUMNS,
    cdf,
    quantile_differences,
    request_pairs,
    samples,
    wide,
)

POINTS = 600
"""Requests that a scatter shows as points at most; more are counted in squares."""
SINGLED_OUT = 60
"""Requests that are points even then: those with the largest differences."""
BINS = 48
"""Squares along each side."""
CURVE = 400
"""Points that a distribution function is drawn through."""


def latency_figure(frames: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Distribution functions of TTFT, TPOT and E2E (label -> `per_request` frame); of two runs, also how far each
    percentile of the second one is from the first one's."""
    two = len(frames) > 1
    figure = make_subplots(
        rows=1 + two,
        cols=3,
        horizontal_spacing=0.05,
        vertical_spacing=0.17,
        row_heights=[0.66, 0.34] if two else [1.0],
    )
    for at, (column, title) in enumerate(LATENCY_COLUMNS.items(), start=1):
        values = {label: samples(frame, column) for label, frame in frames.items()}
        for place, (label, ascending) in enumerate(values.items()):
            x, y = cdf(ascending, CURVE)
            hover = f"%{{y:.1%}} of requests within %{{x:,.4g}} ms<extra>{title}</extra>"
            figure.add_trace(line(label, place, x, y, at == 1, hover), row=1, col=at)
        figure.update_xaxes(title_text=f"{title} (ms)", **latency_axis(*values.values()), row=1, col=at)
        if two:
            percentiles, difference = quantile_differences(*list(values.values())[:2])
            reach = 1.08 * max([0.5, *(100 * np.abs(difference))])
            figure.update_yaxes(range=[-reach, reach], nticks=5, row=2, col=at)
            hover = f"{title} p%{{x:.0f}}: %{{y:+.2f}} %<extra></extra>"
            figure.add_trace(
                line("difference", 1, percentiles, 100 * difference, False, hover, "linear"), row=2, col=at
            )
            figure.update_xaxes(title_text=f"percentile of {title}", range=[0, 100], row=2, col=at)
    figure.update_yaxes(range=[0, 1.02], row=1)
    figure.update_yaxes(title_text="share of requests", row=1, col=1)
    if two:
        figure.update_yaxes(title_text="difference (%)", row=2, col=1)
        figure.update_yaxes(tickformat=",~g", row=2)
        figure.update_yaxes(zeroline=True, zerolinecolor=theme.ink(), zerolinewidth=1, row=2)
    return laid_out(figure, 520 if two else 340)


def scatter_figure(a: pd.DataFrame, b: pd.DataFrame, label_a: str, label_b: str) -> go.Figure:
    """Each request's TTFT, TPOT and E2E in run b over those in run a (`per_request` frames), with the diagonal.

    More than `POINTS` requests are counted in squares, and those that differ most stand out as points.
    """
    figure = make_subplots(rows=1, cols=3, horizontal_spacing=0.085)
    most = 1
    for at, (column, title) in enumerate(LATENCY_COLUMNS.items(), start=1):
        pairs = request_pairs(a, b, column)
        many = len(pairs) > POINTS
        merged = np.sort(pairs[["a", "b"]].to_numpy(np.float64).ravel())
        axis = latency_axis(merged)
        if many:
            squares = _squares(pairs, merged, axis.get("type") == "log")
            most = max(most, int(np.nanmax(squares.customdata)))
            hover = f"%{{customdata:,}} requests, {title} %{{x:,.4g}} ms, then %{{y:,.4g}} ms<extra></extra>"
            figure.add_trace(squares.update(hovertemplate=hover), row=1, col=at)
        ends = merged[[0, -1]] if len(merged) else [0, 1]
        diagonal = {"color": theme.ink(), "width": 1.5, "dash": "dot"}
        figure.add_trace(
            go.Scatter(x=ends, y=ends, mode="lines", line=diagonal, hoverinfo="skip", showlegend=False), row=1, col=at
        )
        shown = pairs.head(SINGLED_OUT if many else POINTS)
        colour = theme.colours()[1 if many else 0]
        opacity = 0.9 if many else float(np.clip(12 / np.sqrt(max(len(shown), 1)), 0.25, 0.75))
        hover = f"request %{{customdata}}<br>{title} %{{x:,.4g}} ms, then %{{y:,.4g}} ms<extra></extra>"
        figure.add_trace(
            go.Scatter(
                x=shown["a"],
                y=shown["b"],
                mode="markers",
                marker={"color": colour, "size": 5, "opacity": opacity},
                customdata=shown["request_id"],
                hovertemplate=hover,
                showlegend=False,
            ),
            row=1,
            col=at,
        )
        figure.update_xaxes(title_text=f"{title}, {label_a} (ms)", **axis, row=1, col=at)
        figure.update_yaxes(title_text=f"{title}, {label_b} (ms)", **axis, row=1, col=at)
    if most == 1:
        return laid_out(figure, 390, t=16)
    return laid_out(figure, 390, t=16, r=92).update_layout(coloraxis=_counts_axis(most))


def _squares(pairs: pd.DataFrame, ascending: np.ndarray, log: bool) -> go.Heatmap:
    """How many requests are in each square; `customdata` is that, and the colour its logarithm."""
    low, high = (float(ascending[0]) if log else 0.0), float(ascending[-1])
    edges = np.geomspace(low, high, BINS + 1) if log else np.linspace(low, high, BINS + 1)
    counts = np.histogram2d(pairs["b"], pairs["a"], bins=(edges, edges))[0]
    with np.errstate(divide="ignore"):
        shade = np.where(counts > 0, np.log10(counts), np.nan)
    return go.Heatmap(
        x=edges.astype(np.float32), y=edges.astype(np.float32), z=shade.astype(np.float32),
        customdata=counts.astype(np.int32), coloraxis="coloraxis", hoverongaps=False,
    )  # fmt: skip


def _counts_axis(most: int) -> dict[str, Any]:
    """Colours of `_squares`, and their key."""
    red, green, blue = (int(theme.colours()[0][at : at + 2], 16) for at in (1, 3, 5))
    scale = [[share, f"rgba({red},{green},{blue},{opacity})"] for share, opacity in ((0, 0.16), (1, 1))]
    ticks = [10**decade for decade in range(int(np.log10(most)) + 1)]
    bar = {"title": {"text": "requests"}, "thickness": 10, "outlinewidth": 0, "len": 0.9}
    bar |= {"tickvals": np.log10(ticks).tolist(), "ticktext": [f"{tick:,}" for tick in ticks]}
    return {"colorscale": scale, "cmin": 0.0, "cmax": float(np.log10(most)), "colorbar": bar}


def latency_axis(*values: np.ndarray) -> dict[str, Any]:
    """An axis from zero, or logarithmic where the values span decades."""
    merged = np.sort(np.concatenate([*values, np.zeros(0)]))
    if not wide(merged):
        return {"tickformat": ",~g", "nticks": 6, "rangemode": "tozero"}
    decades = np.log10(merged[-1] / merged[0])
    return {"tickformat": ",~g", "type": "log", "dtick": "D2" if decades < 2.5 else 1}


def line(
    label: str,
    place: int,
    x: np.ndarray | pd.Series,
    y: np.ndarray | pd.Series,
    in_legend: bool,
    hover: str,
    shape: str = "hv",
) -> go.Scatter:
    """A run's line: colour and dashes tell runs apart, in black and white too."""
    colours = theme.colours()
    style = {"color": colours[place % len(colours)], "dash": theme.DASHES[place % len(theme.DASHES)]}
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        name=label,
        legendgroup=label,
        showlegend=in_legend,
        line={**style, "width": 2, "shape": shape},
        hovertemplate=hover,
    )


def laid_out(figure: go.Figure, height: int, **margins: Any) -> go.Figure:
    """Titles clear of the ticks, the legend above, and margins that stay as they are: to find others plotly.js would
    draw the figure again and again."""
    legend = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "title": {"text": ""}}
    figure.update_xaxes(title_standoff=12).update_yaxes(title_standoff=14)
    margin = {"l": 82, "r": 12, "t": 44, "b": 50, "autoexpand": False} | margins
    return figure.update_layout(height=height, margin=margin, legend=legend)
