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

STATES = {
    "running": "running<br>requests",
    "waiting": "waiting<br>requests",
    "kv_share": "KV blocks<br>in use (%)",
    "host_share": "host KV blocks<br>in use (%)",
    "disk_share": "disk KV blocks<br>in use (%)",
}
"""Columns of the frames that `timeline_figure` draws -> titles of their axes; the last two where a run has them."""


def timeline_figure(
    steps: Mapping[str, pd.DataFrame], states: Mapping[str, pd.DataFrame], begin_s: float, end_s: float
) -> go.Figure:
    """Both runs on one time axis (label -> `composition` and `timeline.states` frames): what the device did, one strip
    a run; then running and waiting requests, KV blocks in each tier, preemptions and swaps, overlaid."""
    shown = {column: title for column, title in STATES.items() if any(column in frame for frame in states.values())}
    swaps = any(frame[["swapped_out", "swapped_in"]].to_numpy().any() for frame in steps.values())
    strips = len(steps)
    heights = [0.11] * strips + [0.2] * len(shown) + [0.13] * (1 + swaps)
    height = 200 + 66 * strips + 118 * len(shown) + 78 * swaps
    figure = make_subplots(
        rows=len(heights), cols=1, shared_xaxes=True, vertical_spacing=26 / height, row_heights=heights
    )
    for row, (label, frame) in enumerate(steps.items(), start=1):
        _draw_steps(figure, row, label, frame)
    for row, (column, title) in enumerate(shown.items(), start=strips + 1):
        for place, (label, frame) in enumerate(states.items()):
            if len(frame) and column in frame:
                spans = over_time(frame, column, 600)
                hover = f"%{{y:,.4g}} {title.replace('<br>', ' ')} at %{{x:,.4f}} s<extra></extra>"
                drawn = line(label, place, spans["t_s"], spans["mean"], row == strips + 1, hover)
                figure.add_trace(drawn, row=row, col=1)
        figure.update_yaxes(title_text=title, rangemode="tozero", nticks=4, tickformat=",~g", row=row, col=1)
    _draw_counts(figure, strips + len(shown) + 1, steps, swaps)
    figure.update_xaxes(range=[begin_s, end_s], tickformat=",~g")
    figure.update_xaxes(title_text="time since the run began (s)", row=len(heights), col=1)
    laid_out(figure, height)
    figure.update_yaxes(title_standoff=16, title_font_size=11)
    return figure.update_layout(
        dragmode="select",
        selectdirection="h",
        margin={"t": 72, "l": 84},
        legend={"y": 1.0 + 36 / height},
        legend2={"orientation": "h", "yanchor": "bottom", "y": 1.0 + 10 / height, "x": 0, "title": {"text": ""}},
    )


def _draw_steps(figure: go.Figure, row: int, label: str, frame: pd.DataFrame) -> None:
    """A strip: of each span of time, the share of each kind of step, stacked; the run's name above it."""
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
    figure.update_yaxes(
        title_text="steps (share<br>of time)", range=[0, 1], showticklabels=False, showgrid=False, row=row, col=1
    )
    font = {"color": theme.colours()[row - 1], "size": 11}
    top = figure.layout["yaxis" if row == 1 else f"yaxis{row}"].domain[1]
    above = {"xref": "paper", "yref": "paper", "x": 1, "y": top, "xanchor": "right", "yanchor": "bottom"}
    figure.add_annotation({"text": label, "font": font, "showarrow": False, **above})


def _draw_counts(figure: go.Figure, row: int, steps: Mapping[str, pd.DataFrame], swaps: bool) -> None:
    """Preemptions in each span; below them, where there were any, tokens whose KV was moved out and back in."""
    for place, (label, frame) in enumerate(steps.items()):
        hover = f"%{{y:,}} preemptions from %{{x:,.4f}} s on<extra>{label}</extra>"
        figure.add_trace(line(label, place, frame["t_s"], frame["preemptions"], False, hover), row=row, col=1)
        for way, sign in (("out", 1), ("in", -1)) if swaps else ():
            hover = f"%{{customdata:,}} tokens swapped {way} from %{{x:,.4f}} s on<extra>{label}</extra>"
            moved = frame[f"swapped_{way}"]
            drawn = line(label, place, frame["t_s"], sign * moved, False, hover)
            figure.add_trace(drawn.update(customdata=moved), row=row + 1, col=1)
    top = max([1, *(int(frame["preemptions"].max()) for frame in steps.values() if len(frame))])
    figure.update_yaxes(title_text="preemptions<br>(count)", range=[0, 1.1 * top], nticks=3, row=row, col=1)
    if swaps:
        zero = {"zeroline": True, "zerolinecolor": theme.ink()}
        figure.update_yaxes(title_text="swapped out,<br>−in (tokens)", nticks=4, **zero, row=row + 1, col=1)


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
    return laid_out(figure, 120 + 48 * len(names), l=8, b=8, autoexpand=True)
