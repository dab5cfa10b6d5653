"""Interactive figures of the page "Timeline"."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dashboard import theme
from dashboard.figures import laid_out, line
from experiments.composition import KINDS
from experiments.life import PHASES, Life
from experiments.series import PHASE_COLOURS, STEP_COLOURS, over_time

STATES = {"running": "running<br>requests", "waiting": "waiting<br>requests", "kv_share": "KV blocks<br>in use (%)"}
"""Columns of the frames that `timeline_figure` draws -> titles of their axes."""


def timeline_figure(
    steps: Mapping[str, pd.DataFrame], states: Mapping[str, pd.DataFrame], begin_s: float, end_s: float
) -> go.Figure:
    """Both runs on one time axis (label -> `composition` and state frames): what the device did, one strip a run; then
    running and waiting requests, KV blocks and preemptions, overlaid."""
    strips = len(steps)
    rows = strips + len(STATES) + 1
    heights = [0.11] * strips + [0.2] * len(STATES) + [0.13]
    figure = make_subplots(rows=rows, cols=1, shared_xaxes=True, vertical_spacing=0.034, row_heights=heights)
    for row, (label, frame) in enumerate(steps.items(), start=1):
        for kind, title in KINDS.items():
            hover = f"%{{y:.0%}} of the time {title}, at %{{x:,.4f}} s<extra>{label}</extra>"
            figure.add_trace(
                go.Scatter(
                    x=frame["t_s"],
                    y=frame[kind],
                    name=title,
                    legendgroup=title,
                    legend="legend2",
                    showlegend=row == 1,
                    stackgroup=f"steps{row}",
                    line={"width": 0, "shape": "hv", "color": STEP_COLOURS[kind]},
                    fillcolor=STEP_COLOURS[kind],
                    hovertemplate=hover,
                ),
                row=row,
                col=1,
            )
        colour = theme.colours()[row - 1]
        figure.update_yaxes(
            title_text="steps (share<br>of time)", range=[0, 1], showticklabels=False, showgrid=False, row=row, col=1
        )
        top = figure.layout["yaxis" if row == 1 else f"yaxis{row}"].domain[1]
        figure.add_annotation(
            {
                "text": label,
                "font": {"color": colour, "size": 11},
                "showarrow": False,
                "xref": "paper",
                "yref": "paper",
            },
            x=1,
            y=top,
            xanchor="right",
            yanchor="bottom",
        )
    for at, (column, title) in enumerate(STATES.items(), start=strips + 1):
        for place, (label, frame) in enumerate(states.items()):
            if len(frame):
                spans = over_time(frame, column, 600)
                hover = f"%{{y:,.4g}} {title.replace('<br>', ' ')} at %{{x:,.4f}} s<extra></extra>"
                figure.add_trace(
                    line(label, place, spans["t_s"], spans["mean"], at == strips + 1, hover), row=at, col=1
                )
        figure.update_yaxes(title_text=title, rangemode="tozero", nticks=4, row=at, col=1)
    for place, (label, frame) in enumerate(steps.items()):
        hover = f"%{{y:,}} preemptions from %{{x:,.4f}} s on<extra>{label}</extra>"
        figure.add_trace(line(label, place, frame["t_s"], frame["preemptions"], False, hover), row=rows, col=1)
    top = max([1, *(int(frame["preemptions"].max()) for frame in steps.values() if len(frame))])
    figure.update_yaxes(title_text="preemptions<br>(count)", range=[0, 1.1 * top], nticks=3, row=rows, col=1)
    figure.update_xaxes(range=[begin_s, end_s], tickformat=",~g")
    figure.update_xaxes(title_text="time since the run began (s)", row=rows, col=1)
    laid_out(figure, 200 + 66 * strips + 118 * len(STATES))
    figure.update_yaxes(title_standoff=16, title_font_size=11)
    return figure.update_layout(
        dragmode="select",
        selectdirection="h",
        margin={"t": 64},
        legend={"y": 1.055},
        legend2={"orientation": "h", "yanchor": "bottom", "y": 1.015, "x": 0, "title": {"text": ""}},
    )


def life_figure(lives: Mapping[str, Life]) -> go.Figure:
    """A request's life, one lane a run and replica that it was on, coloured by what it did."""
    figure = go.Figure()
    lanes = {label: life.lanes(label) for label, life in lives.items()}
    names = [name for of in lanes.values() for name in of.values()]
    for phase in PHASES:
        spans = [
            (lanes[label][span.replica], span)
            for label, life in lives.items()
            for span in life.spans
            if span.phase == phase
        ]
        figure.add_trace(
            go.Bar(
                y=[label for label, _ in spans],
                base=[span.begin_ns / 1e9 for _, span in spans],
                x=[(span.end_ns - span.begin_ns) / 1e9 for _, span in spans],
                orientation="h",
                name=phase,
                marker={"color": PHASE_COLOURS[phase], "line": {"width": 0}},
                customdata=[(span.end_ns - span.begin_ns) / 1e6 for _, span in spans],
                hovertemplate=f"{phase} from %{{base:,.4f}} s for %{{customdata:,.1f}} ms<extra></extra>",
                visible=True if spans else "legendonly",
                showlegend=bool(spans),
            )
        )
    ends = [ns for life in lives.values() for span in life.spans for ns in (span.begin_ns, span.end_ns)] or [0, 1]
    margin = 0.02 * (max(ends) - min(ends)) or 1.0
    for life, label in zip(lives.values(), lives, strict=True):
        replica = life.first_token_replica
        if life.first_token_ns is not None and replica is not None:
            figure.add_trace(
                go.Scatter(
                    x=[life.first_token_ns / 1e9],
                    y=[lanes[label][replica]],
                    mode="markers",
                    marker={
                        "symbol": "diamond",
                        "size": 11,
                        "color": theme.ink(),
                        "line": {"width": 1.5, "color": "white"},
                    },
                    name="first token",
                    legendgroup="first token",
                    showlegend=label == next(iter(lives)),
                    hovertemplate="first token at %{x:,.4f} s<extra></extra>",
                )
            )
    figure.update_layout(barmode="overlay", bargap=0.35)
    figure.update_xaxes(
        title_text="time since the run began (s)",
        range=[(min(ends) - margin) / 1e9, (max(ends) + margin) / 1e9],
        tickformat=",~g",
    )
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], showgrid=False)
    return laid_out(figure, 120 + 48 * len(names))
