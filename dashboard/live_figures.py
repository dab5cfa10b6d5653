"""The interactive figure of the page "Live"."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dashboard import theme
from dashboard.figures import laid_out, line
from experiments.live.series import ERRORS, PANELS


def live_figure(frames: Mapping[str, pd.DataFrame], error: pd.DataFrame, window_s: float) -> go.Figure:
    """The last seconds of both sides (label -> frame of `experiments.live.series.recent`), and below how the error of
    the means over all requests so far has gone."""
    figure = make_subplots(
        rows=3,
        cols=3,
        specs=[[{}] * 3, [{}] * 3, [{"colspan": 3}, None, None]],
        horizontal_spacing=0.07,
        vertical_spacing=0.13,
        row_heights=[0.36, 0.36, 0.28],
    )
    for at, (title, columns) in enumerate(PANELS.items()):
        row, col = at // 3 + 1, at % 3 + 1
        for place, (label, frame) in enumerate(frames.items()):
            for number, column in enumerate(columns):
                what = column.replace("_", " ")
                hover = f"{what} %{{y:,.4g}} at %{{x:.1f}} s<extra>{label}</extra>"
                drawn = line(label, place, frame["t_s"], frame[column].round(3), not at, hover, "linear")
                drawn.line.width = 1 if number else 2
                figure.add_trace(drawn, row=row, col=col)
        top = max([float(np.nanmax(f[c])) for f in frames.values() for c in columns if f[c].notna().any()] or [0.0])
        figure.update_yaxes(title_text=title, range=[0, 1.08 * top or 1.0], nticks=5, row=row, col=col)
    for place, latency in enumerate(ERRORS, start=2):
        hover = f"%{{y:+.2f}} %, mean {latency} of all requests so far, at %{{x:.1f}} s<extra></extra>"
        drawn = line(latency, place, error["t_s"], error[latency].round(3), True, hover, "linear")
        drawn.legend = "legend2"
        figure.add_trace(drawn, row=3, col=1)
    reach = 1.15 * max([1.0, *(float(error[c].abs().max()) for c in ERRORS if error[c].notna().any())])
    figure.update_yaxes(
        title_text="error of the<br>means so far (%)", range=[-reach, reach], zeroline=True, nticks=5,
        zerolinecolor=theme.ink(), row=3, col=1,
    )  # fmt: skip
    figure.update_xaxes(range=[-window_s, 0], nticks=6)
    figure.update_xaxes(title_text="seconds before now", row=3, col=1)
    figure.update_yaxes(title_standoff=10, title_font_size=11, tickformat=",~g")
    below = figure.layout.yaxis7.domain[1]
    return laid_out(figure, 660).update_layout(
        legend2={"orientation": "h", "yanchor": "bottom", "y": below + 0.005, "x": 0, "title": {"text": ""}}
    )
