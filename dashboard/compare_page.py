"""The page "Compare": two runs of one workload side by side, with the figures of `diptych compare`."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pandas as pd
import streamlit as st

from dashboard.figures import latency_figure, timeline_figure
from dashboard.store import Entry, fingerprint, list_runs, open_run
from experiments.compare import Comparison, compare
from experiments.metrics import per_request
from experiments.records import RunError
from experiments.render import difference_heading, headings
from experiments.timeline import timeline

TILES = ("Output tokens", "TTFT p50", "TPOT p50", "E2E p50")
"""Lines of the table that stand above it in large."""


def show(root: Path) -> None:
    """Draw the page for the runs under `root`."""
    st.title("Compare")
    if not root.is_dir():
        st.error(plain(f"There is no folder {root}. Start the dashboard with the folder that holds your runs."))
        return
    entries = list_runs(root)
    readable = [entry for entry in entries if not entry.error]
    for entry in entries:
        if entry.error:
            st.sidebar.warning(plain(f"{entry.name}: {entry.error}"))
    if len(readable) < 2:
        found = "no run" if not readable else f"one run, {readable[0].name}"
        st.info(plain(f"There is {found} in {root} so far, and it takes two: `diptych run` and `diptych simulate`."))
        return
    a, b = _choose(readable)
    if a.name == b.name:
        st.info("Choose two different runs in the sidebar.")
        return
    try:
        with st.spinner("Reading the records"):
            comparison = _compared(str(root), a.name, b.name, (fingerprint(root, a.name), fingerprint(root, b.name)))
            _draw(comparison)
    except RunError as error:
        st.error(plain(f"These runs cannot be compared: {error}"))


def plain(text: str) -> str:
    """Text as it is, for places that would read it as Markdown."""
    return re.sub(r"([\\`*_{}\[\]()<>#+.!|$~:-])", r"\\\1", text)


def _choose(entries: list[Entry]) -> tuple[Entry, Entry]:
    """The reference run and the one compared with it: where there are both, a real and a simulated one at first."""
    first = next((i for i, entry in enumerate(entries) if entry.kind == "real"), 0)
    others = [i for i in range(len(entries)) if i != first]
    simulated = [i for i in others if entries[i].kind == "sim"]
    # Of several simulations, the one whose name begins most like the reference's, letter by letter.
    alike = {i: len(os.path.commonprefix([entries[i].name, entries[first].name])) for i in simulated}  # noqa: RUF071
    second = max(alike, key=lambda i: alike[i]) if alike else others[0]
    by_name = {entry.name: entry for entry in entries}
    names = list(by_name)
    a = st.sidebar.selectbox("Reference run", names, index=first, format_func=lambda name: by_name[name].label)
    b = st.sidebar.selectbox("Compared with it", names, index=second, format_func=lambda name: by_name[name].label)
    return by_name[a], by_name[b]


@st.cache_resource(max_entries=4, show_spinner=False)
def _compared(root: str, a: str, b: str, fingerprints: object) -> Comparison:
    """Cached until a file of either run changes: that is what `fingerprints` is for."""
    return compare(open_run(Path(root), a), open_run(Path(root), b))


def _draw(comparison: Comparison) -> None:
    name_a, name_b = headings(comparison)
    st.caption(plain(f"{comparison.b.label} against {comparison.a.label}"))
    rows = comparison.rows()
    by_metric = {row.metric: row for row in rows}
    for column, metric in zip(st.columns(len(TILES)), TILES, strict=True):
        row = by_metric[metric]
        column.metric(f"{metric} ({row.unit})", row.b, f"{row.error} against {row.a}", delta_color="off")
    if comparison.decisions_compared and comparison.divergence is None:
        st.success(plain(f"Policy: {comparison.decisions_line()}."))
    else:
        st.warning(plain(f"Policy: {comparison.decisions_line()}."))
    _draw_divergence(comparison)
    st.dataframe(
        pd.DataFrame(
            [(r.metric, r.unit, r.a, r.b, r.error) for r in rows],
            columns=["metric", "unit", *_apart(name_a, name_b), difference_heading(comparison)],
        ),
        hide_index=True,
        height=38 + 35 * len(rows),
    )
    st.caption(plain("\n\n".join(comparison.notes())))
    labels = _apart(comparison.a.label, comparison.b.label)
    runs = dict(zip(labels, (comparison.a, comparison.b), strict=True))
    st.subheader("Latency")
    st.plotly_chart(latency_figure({label: per_request(run) for label, run in runs.items()}), key="latency")
    st.subheader("Queues and memory")
    outside = sorted(run.name for run in runs.values() if not run.has_steps)
    if outside:
        st.info(plain(f"A client measured from outside, and saw neither queues nor memory: {', '.join(outside)}."))
    inside = {label: timeline(run) for label, run in runs.items() if run.has_steps}
    if inside:
        st.plotly_chart(timeline_figure(inside), key="timeline")


def _draw_divergence(comparison: Comparison) -> None:
    divergence = comparison.divergence
    if divergence is None:
        return
    with st.expander(f"Decisions of step {divergence.step} in both runs"):
        columns = st.columns(2)
        pairs = ((comparison.a, divergence.decisions_a), (comparison.b, divergence.decisions_b))
        for column, (run, decisions) in zip(columns, pairs, strict=True):
            column.text("\n".join([run.label, *(decisions or ("nothing",))]))


def _apart(a: str, b: str) -> tuple[str, str]:
    """Two headings that are not the same."""
    return (a, b) if a != b else (f"{a}, first", f"{b}, second")
