"""The figure of the dashboard's page "Live" on paper."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from experiments.live.series import ERRORS, PANELS
from experiments.plots import STYLE, line_style


def live_figure(frames: Mapping[str, pd.DataFrame], error: pd.DataFrame) -> Figure:
    """The last seconds of both sides (label -> frame of `series.recent`), and how their error has gone."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 7), layout="constrained")
        grid = figure.add_gridspec(3, 3)
        for at, (title, columns) in enumerate(PANELS.items()):
            axis = figure.add_subplot(grid[at // 3, at % 3])
            for place, (label, frame) in enumerate(frames.items()):
                for number, column in enumerate(columns):
                    style = line_style(place) | {"linewidth": 0.8 if number else 1.3}
                    axis.plot(frame["t_s"], frame[column], label=None if number else label, **style)
            axis.set_title(title, loc="left")
            axis.set_ylim(bottom=0)
            if not at:
                figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2)
        axis = figure.add_subplot(grid[2, :])
        for place, latency in enumerate(ERRORS):
            axis.plot(error["t_s"], error[latency], label=latency, **line_style(place + 2))
        axis.axhline(0, color="#6b7280", linewidth=0.8)
        axis.set_title("error of the twin's means so far (%)", loc="left")
        axis.set_xlabel("seconds before now")
        axis.legend(loc="upper left", ncols=3)
        return figure
