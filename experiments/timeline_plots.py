"""The figures of the dashboard's page "Timeline" on paper."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from experiments.composition import KINDS
from experiments.life import PHASES, Life
from experiments.plots import STYLE, line_style
from experiments.series import PHASE_COLOURS, STEP_COLOURS, over_time

STATES = {
    "running": "running requests",
    "waiting": "waiting requests",
    "kv_share": "KV blocks in use (%)",
    "host_share": "host blocks in use (%)",
    "disk_share": "disk blocks in use (%)",
}


def timeline_figure(steps: Mapping[str, pd.DataFrame], states: Mapping[str, pd.DataFrame]) -> Figure:
    """Both runs on one time axis (label -> `composition` frame; label -> states): strips of steps, then the states."""
    shown = {column: title for column, title in STATES.items() if any(column in frame for frame in states.values())}
    swaps = any(frame[["swapped_out", "swapped_in"]].to_numpy().any() for frame in steps.values())
    heights = [0.5] * len(steps) + [1] * len(shown) + [0.7] * (1 + swaps)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 1.5 * len(heights)), layout="constrained")
        axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        for axis, (label, frame) in zip(axes, steps.items(), strict=False):
            colours = [STEP_COLOURS[kind] if kind != "idle" else "#eceef1" for kind in KINDS]
            shares = [frame[kind] for kind in KINDS]
            axis.stackplot(frame["t_s"], *shares, labels=list(KINDS.values()), colors=colours, step="post", linewidth=0)
            axis.set_title(f"steps of {label}", loc="left")
            axis.set(ylim=(0, 1), yticks=[])
        for axis, (column, title) in zip(axes[len(steps) :], shown.items(), strict=False):
            for place, (label, frame) in enumerate(states.items()):
                if column not in frame:
                    continue
                spans = over_time(frame, column, 600) if len(frame) else pd.DataFrame({"t_s": [], "mean": []})
                axis.step(spans["t_s"], spans["mean"], where="post", label=label, **line_style(place))
            axis.set_ylabel(title)
            axis.set_ylim(bottom=0)
        counts = axes[len(steps) + len(shown)]
        for place, (label, frame) in enumerate(steps.items()):
            counts.step(frame["t_s"], frame["preemptions"], where="post", label=label, **line_style(place))
            for way, sign in (("out", 1), ("in", -1)) if swaps else ():
                axes[-1].step(frame["t_s"], sign * frame[f"swapped_{way}"], where="post", **line_style(place))
        counts.set_ylabel("preemptions")
        counts.set_ylim(bottom=0)
        if swaps:
            axes[-1].set_ylabel("swapped out,\n−in (tokens)")
        axes[-1].set_xlabel("time since the run began (s)")
        handles, labels = axes[0].get_legend_handles_labels()
        more = axes[len(steps)].get_legend_handles_labels()
        figure.legend([*more[0], *handles], [*more[1], *labels], loc="outside upper center", ncols=3)
        return figure


def life_figure(lives: Mapping[str, Life]) -> Figure:
    """A request's life, one lane a run and replica that it was on, coloured by what it did."""
    with mpl.rc_context(STYLE):
        lanes = [(life, r, name) for label, life in lives.items() for r, name in life.lanes(label).items()]
        figure = Figure(figsize=(10, 1.2 + 0.5 * len(lanes)), layout="constrained")
        axis = figure.subplots()
        for place, (life, replica, _) in enumerate(lanes):
            for phase in PHASES:
                own = [s for s in life.spans if s.phase == phase and s.replica == replica]
                spans = [(s.begin_ns / 1e9, (s.end_ns - s.begin_ns) / 1e9) for s in own]
                axis.broken_barh(spans, (place - 0.3, 0.6), color=PHASE_COLOURS[phase])
        axis.set_yticks(range(len(lanes)), [name for _, _, name in lanes])
        axis.invert_yaxis()
        axis.set_xlabel("time since the run began (s)")
        keys = [mpl.patches.Patch(color=PHASE_COLOURS[phase], label=phase) for phase in PHASES]
        figure.legend(handles=keys, loc="outside upper center", ncols=len(PHASES))
        return figure
