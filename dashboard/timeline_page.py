"""The page "Timeline": what both panels did when, on one time axis, down to a single request's life."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from dashboard.keeping import kept
from dashboard.picking import pick_two, readable_runs
from dashboard.store import fingerprint, open_run
from dashboard.timeline_figures import life_figure, timeline_figure
from dashboard.ui import downloads, figure, note, plain, remember, revised, table
from experiments.compare import format_figure
from experiments.composition import composition
from experiments.life import PHASES, Life, request_life
from experiments.metrics import per_request
from experiments.records import Run, RunError
from experiments.timeline import states, window
from experiments.trace_export import write_trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import

SPANS = 600
"""Spans of time that a figure is drawn in: about one for two pixels."""


def show(root: Path) -> None:
    """Draw the page for the runs under `root`."""
    readable = readable_runs(root)
    if readable is None:
        return
    if not readable:
        st.info(plain(f"There is no run in {root} so far: make one with `diptych run` or `diptych simulate`."))
        return
    a, b = pick_two(readable)
    names = list(dict.fromkeys([a.name, b.name]))
    try:
        with st.spinner("Reading the records"):
            runs = {name: _opened(str(root), name, fingerprint(root, name)) for name in names}
            labelled = _labelled(runs)
        _draw(labelled)
    except RunError as error:
        st.error(plain(f"These runs cannot be shown: {error}"))


@st.cache_resource(max_entries=8, show_spinner=False)
def _opened(root: str, name: str, fingerprints: object) -> Run:
    return open_run(Path(root), name)


_STATES: WeakKeyDictionary[Run, pd.DataFrame] = WeakKeyDictionary()
_LIVES: WeakKeyDictionary[Run, dict[int, Life]] = WeakKeyDictionary()
"""What was worked out of the runs that `_opened` keeps, for as long as it does."""


def _states(run: Run) -> pd.DataFrame:
    if run not in _STATES:
        _STATES[run] = states(run)
    return _STATES[run]


def _labelled(runs: dict[str, Run]) -> dict[str, Run]:
    labels = [run.label for run in runs.values()]
    names = labels if len(set(labels)) == len(labels) else [f"{name} ({run.kind})" for name, run in runs.items()]
    return dict(zip(names, runs.values(), strict=True))


def _draw(runs: dict[str, Run]) -> None:
    inside = {label: run for label, run in runs.items() if run.has_steps}
    outside = sorted(run.name for run in runs.values() if not run.has_steps)
    if outside:
        st.info(
            plain(f"A client measured from outside, and saw neither steps, queues nor memory: {', '.join(outside)}.")
        )
    if not any(len(run.steps) for run in inside.values()):
        st.info("No step is recorded yet.")
        return
    whole = max(int(run.steps["end_ns"].max()) for run in inside.values() if len(run.steps))
    begin, end = _chosen_window(whole)

    def steps() -> dict[str, pd.DataFrame]:
        return {label: composition(run, begin, end, SPANS) for label, run in inside.items()}

    def over_time() -> dict[str, pd.DataFrame]:
        return {label: window(_states(run), begin, end) for label, run in inside.items()}

    def on_paper() -> Figure:
        from experiments.timeline_plots import timeline_figure as drawn  # matplotlib is slow to import

        return drawn(steps(), over_time())

    def data() -> pd.DataFrame:
        return pd.concat([frame.assign(run=label) for label, frame in steps().items()])

    def on_screen() -> go.Figure:
        return timeline_figure(steps(), over_time(), begin / 1e9, end / 1e9)

    chart = st.plotly_chart(
        revised(kept(tuple(inside.values()), ("timeline", begin, end, *inside), on_screen)),
        key=f"timeline:{begin}:{end}",
        on_select="rerun",
        selection_mode="box",
        config={"displaylogo": False, "modeBarButtonsToRemove": ["lasso2d", "autoScale2d"]},
    )
    _zoom(chart, begin, end, whole)
    shown = sum(_steps_within(run, begin, end) for run in inside.values())
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute", key="below"):
        note(
            f"{shown:,} steps in {format_figure((end - begin) / 1e9)} s, "
            f"{format_figure((end - begin) / SPANS / 1e6)} ms a span. "
            f"Drag over a part to see it closer."
        )
        downloads("timeline", on_paper, data)
    _draw_life(inside)
    _draw_exports(inside)


def _chosen_window(whole: int) -> tuple[int, int]:
    """The part of time in the URL, as `from` and `to` in seconds; the whole run where it makes no sense."""
    try:
        begin = round(float(st.query_params.get("from", "0")) * 1e9)
        end = round(float(st.query_params.get("to", str(whole / 1e9))) * 1e9)
    except (ValueError, OverflowError):
        return 0, whole
    begin, end = max(0, begin), min(whole, end)
    return (begin, end) if end - begin >= 1000 else (0, whole)


def _zoom(chart: object, begin: int, end: int, whole: int) -> None:
    """Go where a frame was drawn, out again, or back to the whole."""
    boxes = getattr(getattr(chart, "selection", None), "box", None) or []
    xs = sorted(float(x) for x in boxes[0]["x"]) if boxes else []
    if len(xs) == 2 and xs[1] - xs[0] > 1e-6:
        _go(xs[0], xs[1])
    if (begin, end) != (0, whole):
        out, back, _ = st.columns([1, 1, 6])
        middle, half = (begin + end) / 2, (end - begin)
        if out.button("Zoom out", icon=":material/zoom_out:", width="stretch"):
            _go(max(0.0, middle - half) / 1e9, min(float(whole), middle + half) / 1e9)
        if back.button("Whole run", icon=":material/fit_width:", width="stretch"):
            for key in ("from", "to"):
                st.query_params.pop(key, None)
            st.rerun()


def _go(begin_s: float, end_s: float) -> None:
    st.query_params["from"], st.query_params["to"] = f"{max(0.0, begin_s):.6f}", f"{end_s:.6f}"
    st.rerun()


def _steps_within(run: Run, begin: int, end: int) -> int:
    steps = run.steps
    ran = (steps["num_decodes"] > 0) | (steps["num_chunks"] > 0)
    return int((ran & (steps["end_ns"] > begin) & (steps["launch_ns"] < end)).sum())


def _draw_life(runs: dict[str, Run]) -> None:
    st.header("A request's life")
    reference = next(iter(runs.values()))
    frame = per_request(reference)
    if not len(frame):
        st.info("No request has ended yet.")
        return
    waited = frame.sort_values("queue_ms", ascending=False, kind="stable")["request_id"]
    wanted = st.query_params.get("request", "")
    first = int(wanted) if wanted.isdigit() else int(waited.iloc[0])
    if st.session_state.get("url:request") != wanted or "request" not in st.session_state:
        st.session_state["request"] = first
    st.session_state["request"] = st.session_state["request"]  # as in `ui.chosen`
    with st.container(horizontal=True, vertical_alignment="bottom", key="which"):
        request = st.number_input("Request", min_value=0, step=1, key="request", width=180)
        note("Without a choice it is the one that waited longest in the reference run.")
    remember("request", str(request))
    lives: dict[str, Life] = {}
    for label, run in runs.items():
        try:
            lives[label] = _life(run, int(request))
        except RunError as error:
            st.warning(plain(str(error)))
    if not lives:
        return

    def on_paper() -> Figure:
        from experiments.timeline_plots import life_figure as drawn

        return drawn(lives)

    def data() -> pd.DataFrame:
        rows = [(label, s.phase, s.begin_ns, s.end_ns) for label, life in lives.items() for s in life.spans]
        return pd.DataFrame(rows, columns=["run", "phase", "begin_ns", "end_ns"])

    alt = "When the request waited, computed its prompt and decoded, in each run"
    which = ("life", int(request), *lives)
    figure("life", kept(tuple(runs.values()), which, lambda: life_figure(lives)), on_paper, data, alt)
    columns = ["run", "status", "prompt (tokens)", "output (tokens)", *(f"{phase} (ms)" for phase in PHASES)]
    rows = [
        [label, life.status, f"{life.prompt_tokens:,}", f"{life.output_tokens:,}"]
        + [f"{life.total_ns(phase) / 1e6:,.1f}" for phase in PHASES]
        for label, life in lives.items()
    ]
    table(columns, rows)
    st.header("Why it waited")
    for column, (label, life) in zip(st.columns(len(lives), gap="medium"), lives.items(), strict=True):
        with column:
            st.caption(plain(label))
            if not runs[label].has_decisions:
                note("The run was recorded without decisions.")
                continue
            for sentence in life.sentences() or ["It did not wait."]:
                note(sentence + "." * (not sentence.endswith(".")))


def _life(run: Run, request: int) -> Life:
    known = _LIVES.setdefault(run, {})
    if request not in known:
        known[request] = request_life(run, request)
    return known[request]


def _draw_exports(runs: dict[str, Run]) -> None:
    st.header("In Perfetto")
    note("The whole run as a trace for ui.perfetto.dev or chrome://tracing; also by: diptych trace-export RUN")
    with st.container(horizontal=True, key="traces"):
        for place, (label, run) in enumerate(runs.items()):
            st.download_button(
                plain(f"Trace of {label}"),
                lambda run=run: write_trace(run),  # type: ignore[misc]
                f"{run.name}.trace.json.gz",
                "application/gzip",
                key=f"trace{place}",
                icon=":material/download:",
                on_click="ignore",
            )
