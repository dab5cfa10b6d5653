"""The page "Live": a running server and its twin, a simulation fed with the same requests as they come."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import streamlit as st

from dashboard import theme
from dashboard.live_figures import live_figure
from dashboard.ui import figure, note, plain, remember, segments, select, table, tile, tiles, value_tile, verdict
from experiments.compare import format_figure
from experiments.live import costs
from experiments.live.series import errors, recent
from experiments.live.server import LiveError, LiveServer
from experiments.live.watch import Difference, Watch, differences

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import

EVERY_S = 2.0
"""Seconds between two looks at the server."""
BUDGET_S = 0.6
"""Seconds of computing that the twin gets at each."""
WINDOWS = {"30": "30 s", "120": "2 min", "600": "10 min"}
SIDES = {"server": "server", "twin": "twin (simulated)"}

_HOW = """
The twin is a simulation with the server's policies, limits and number of replicas. It gets each request when the
server gets it, with the prompt's length, the names of its blocks, and what policies are told. It follows the server's
clock, and **stands still wherever it would have to know what nobody knows yet**: whether a request that still runs on
the server has its last token. So every one of its requests has its true length, and what comes out is what a simulation
of all of it afterwards would give; the price is that it is some seconds behind, the more the faster it is than the
server.

Times begin when the server hands a request to its engine: before that it was read and tokenised. The twin begins with
an empty prefix cache, and does not know blocks of generated tokens; compared are the requests that came since you
attached and are done on both sides. A request whose client went away leaves the twin at the same time, and is not
compared. Where the server's policies or replicas change, or it is started anew, the twin begins anew too.
"""


def show(root: Path) -> None:
    """Draw the page; calibrations are looked for in `root`."""
    st.html(theme.STEADY)
    watch = _attach(root)
    if watch is None:
        note("Start a server (diptych serve --admin), and give its address and the operator's key that it prints.")
        return
    _follow()


def _attach(root: Path) -> Watch | None:
    """The form, and what it has led to."""
    models = costs.choices(root)
    left, middle, right = st.columns([3, 2, 3], gap="medium")
    known = st.session_state.setdefault("server", st.query_params.get("server", "http://127.0.0.1:8000"))
    with left:
        url = st.text_input("Server", known, key="server-field")
    with middle:
        key = st.text_input("Operator's key", type="password", key="server-key")
    with right:
        cost = select("Step times of the twin", "cost", list(models), costs.STATED, lambda name: models.get(name, name))
    remember("server", url)
    watch: Watch | None = st.session_state.get("live")
    with st.container(horizontal=True, vertical_alignment="center", key="attach"):
        if st.button("Attach", type="primary", icon=":material/sensors:"):
            _detach()
            try:
                with st.spinner("Attaching"):
                    st.session_state["live"] = watch = Watch(LiveServer(url, key), costs.maker(cost, root))
            except LiveError as error:
                watch = None
                st.error(plain(str(error)))
        if watch is not None and st.button("Detach", icon=":material/sensors_off:"):
            _detach()
            watch = None
    return watch


def _detach() -> None:
    watch = st.session_state.pop("live", None)
    st.session_state.pop("live-gone", None)
    if watch is not None:
        watch.close()


@st.fragment(run_every=EVERY_S)
def _follow() -> None:
    """Look at the server, let the twin follow, and draw both."""
    watch: Watch | None = st.session_state.get("live")
    if watch is None:
        return
    try:
        watch.poll(BUDGET_S)
        st.session_state.pop("live-gone", None)
    except LiveError as error:
        since = st.session_state.setdefault("live-gone", time.monotonic())
        st.error(
            plain(f"{error}. What is below is {time.monotonic() - since + EVERY_S:.0f} s old or older; trying again."),
            icon=":material/cloud_off:",
        )
    _draw(watch)


def _draw(watch: Watch) -> None:
    pairs = watch.pairs()
    rows = differences(pairs)
    _draw_tiles(watch, rows, len(pairs))
    if watch.renewed:
        note(f"Begun anew: {watch.renewed}.")
    window = float(segments("Window", "window", WINDOWS, "120"))
    frames = {SIDES[side]: frame for side, frame in recent(watch, window).items()}
    error = errors(watch, window)

    def on_paper() -> Figure:
        from experiments.live.plots import live_figure as drawn  # matplotlib is slow to import

        return drawn(frames, error)

    def data() -> pd.DataFrame:
        return pd.concat([frame.assign(side=label) for label, frame in frames.items()])

    alt = "Throughput, requests, memory and latencies of the server and of its twin, and the error between them"
    figure("live", live_figure(frames, error, window), on_paper, data, alt)
    if rows:
        st.header("Error so far")
        table(
            ["latency", "server (ms)", "twin (ms)", "error"],
            [
                (
                    f"{row.latency} {row.statistic}",
                    format_figure(row.server),
                    format_figure(row.twin),
                    f"{row.error:+.1%}",
                )
                for row in rows
            ],
        )
    with st.expander("What the twin is"):
        st.markdown(_HOW)


def _draw_tiles(watch: Watch, rows: list[Difference], count: int) -> None:
    means = {row.latency: row for row in rows if row.statistic == "mean"}
    tails = {row.latency: row for row in rows if row.statistic == "p99"}
    parts = []
    for latency in ("TTFT", "TPOT", "E2E"):
        mean, tail = means.get(latency), tails.get(latency)
        if mean is None or tail is None:
            parts.append(tile(f"{latency}, mean (ms)", "–", ("–", "–"), "no request is done on both sides yet"))
            continue
        both = format_figure(mean.server), format_figure(mean.twin)
        parts.append(tile(f"{latency}, mean (ms)", f"{mean.error:+.1%}", both, f"p99 {tail.error:+.1%}"))
    parts.append(value_tile("Requests compared", f"{count:,}", "came since attaching, done on both sides"))
    waits = "waits for the server to get further" if watch.twin.held else "follows the server's clock"
    if watch.twin.catching_up:
        waits = "catches up with what was there before"
    parts.append(value_tile("Twin behind (s)", f"{watch.lag_s:.1f}", waits))
    tiles(parts)
    about = watch.about
    stack = ", ".join(f"{role} {policy}" for role, policy in about.engines[0].stack.items())
    replicas = f"{watch.replicas} replicas, {about.router}; " * (watch.replicas > 1)
    verdict(f"{about.model}: {replicas}{watch.twin.limits.num_blocks:,} KV blocks; {stack}.", True)
