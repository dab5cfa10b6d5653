"""The page "Compare": two runs of one workload side by side, with the figures of `diptych compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode
from weakref import WeakKeyDictionary, ref

import pandas as pd
import streamlit as st

from dashboard.figures import POINTS, SINGLED_OUT, latency_figure, scatter_figure
from dashboard.keeping import kept
from dashboard.objectives import objectives
from dashboard.picking import pick_two, readable_runs
from dashboard.store import Entry, fingerprint, open_run
from dashboard.ui import downloads, figure, note, plain, segments, table, tile, tiles, verdict
from experiments.attribution import Attribution, attribute, can_attribute
from experiments.compare import Comparison, compare, format_figure, with_objectives
from experiments.metrics import per_request
from experiments.records import Run, RunError
from experiments.render import difference_heading, headings
from experiments.repeats import is_repeat, noise_floor
from experiments.series import LATENCY_COLUMNS, matched, request_pairs, samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import

TILES = ("Output tokens", "TTFT p50", "TPOT p50", "E2E p50", "Goodput")
"""Lines of the table that stand above it in large."""

WORST = 12
"""How many of the requests that differ most are listed."""

REPEATS = 4
"""Repeats that the noise floor is taken from at most."""


def show(root: Path) -> None:
    """Draw the page for the runs under `root`."""
    readable = readable_runs(root)
    if readable is None:
        return
    if len(readable) < 2:
        found = "no run" if not readable else f"one run, {readable[0].name}"
        st.info(plain(f"There is {found} in {root} so far, and it takes two: `diptych run` and `diptych simulate`."))
        return
    a, b = pick_two(readable)
    if a.name == b.name:
        st.info("Choose two different runs.")
        return
    slo = objectives()
    try:
        with st.spinner("Reading the records"):
            comparison = _compared(str(root), a.name, b.name, (fingerprint(root, a.name), fingerprint(root, b.name)))
            noise, repeats = _noise(root, a, readable)
        comparison = with_objectives(comparison, slo)
        _draw(comparison, noise, repeats, a.name, b.name)
    except RunError as error:
        st.error(plain(f"These runs cannot be compared: {error}"))


@st.cache_resource(max_entries=4, show_spinner=False)
def _compared(root: str, a: str, b: str, fingerprints: object) -> Comparison:
    """Cached until a file of either run changes: that is what `fingerprints` is for."""
    return compare(open_run(Path(root), a), open_run(Path(root), b))


def _noise(root: Path, a: Entry, entries: list[Entry]) -> tuple[dict[str, float], int]:
    """The noise floor of the reference run, and from how many repeats it is known."""
    run = open_run(root, a.name)
    found = [e.name for e in entries if e.kind == a.kind and is_repeat(run, open_run(root, e.name))][:REPEATS]
    if not found:
        return {}, 0
    return _floor(str(root), a.name, tuple(found), tuple(fingerprint(root, name) for name in (a.name, *found))), len(
        found
    )


@st.cache_resource(max_entries=16, show_spinner=False)
def _floor(root: str, a: str, repeats: tuple[str, ...], fingerprints: object) -> dict[str, float]:
    return noise_floor(open_run(Path(root), a), [open_run(Path(root), name) for name in repeats])


def _draw(comparison: Comparison, noise: dict[str, float], repeats: int, a: str, b: str) -> None:
    _draw_tiles(comparison, noise, repeats)
    other = comparison.other_step_times()
    if other is not None:
        verdict(f"{other[0].upper()}{other[1:]}.", False)
    _draw_decisions(comparison)
    frames = per_request(comparison.a), per_request(comparison.b)
    both = matched(*frames)
    _draw_latencies(comparison, both if len(both[0]) else frames)
    if len(both[0]):
        _draw_requests(comparison, both, a, b)
    _draw_attribution(comparison)
    _draw_table(comparison, noise)


def _draw_attribution(comparison: Comparison) -> None:
    """Which term of the cost model, or queueing, the error of each mean latency is due to."""
    if not can_attribute(comparison.a, comparison.b):
        return
    found = _attributed(comparison.a, comparison.b)
    if not found.busy:  # with lag 0 no step begins where another one ends: its terms are not known
        return
    st.header("Where the error comes from")
    table(found.heads(), found.rows())
    downloads("attribution", None, lambda: pd.DataFrame(found.rows(), columns=found.heads()))
    with st.expander("The worst steps and requests"):
        for line in found.notes():
            note(line[0].upper() + line[1:] + ".")


def _attributed(real: Run, simulated: Run) -> Attribution:
    known = _ATTRIBUTED.setdefault(real, {})
    if ref(simulated) not in known:
        known[ref(simulated)] = attribute(real, simulated)
    return known[ref(simulated)]


_ATTRIBUTED: WeakKeyDictionary[Run, dict[ref[Run], Attribution]] = WeakKeyDictionary()


def _draw_tiles(comparison: Comparison, noise: dict[str, float], repeats: int) -> None:
    by_metric = {row.metric: row for row in comparison.rows()}
    heading = difference_heading(comparison)
    parts = []
    limited = "Goodput within limits"
    for metric in TILES:
        if metric == "Goodput" and limited in by_metric:
            metric = limited
        row = by_metric.get(metric)
        if row is None:
            parts.append(tile(metric, "–", ("–", "–"), "the requests came without objectives"))
            continue
        times = f"{repeats} repeat{'s' * (repeats > 1)}"
        below = f"{heading}; noise floor {noise[metric]:.1%}, {times}" if metric in noise else f"{heading}; no repeats"
        parts.append(tile(f"{metric} ({row.unit})", row.error, (row.a, row.b), below))
    tiles(parts)


def _draw_decisions(comparison: Comparison) -> None:
    verdict(f"Policy: {comparison.decisions_line()}.", comparison.decisions_compared and comparison.divergence is None)
    divergence = comparison.divergence
    if divergence is None:
        return
    with st.expander(f"Decisions of step {divergence.step} in both runs"):
        columns = st.columns(2)
        pairs = ((comparison.a, divergence.decisions_a), (comparison.b, divergence.decisions_b))
        for column, (run, decisions) in zip(columns, pairs, strict=True):
            column.text("\n".join([run.label, *(decisions or ("nothing",))]))


def _draw_latencies(comparison: Comparison, frames: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    st.header("Latency")
    labels = _labels(comparison)
    by_label = dict(zip(labels, frames, strict=True))

    def data() -> pd.DataFrame:
        kept = ["request_id", "prompt_tokens", "output_tokens", *LATENCY_COLUMNS]
        return pd.concat([frame[kept].assign(run=label) for label, frame in by_label.items()])

    def on_paper() -> Figure:
        from experiments.plots import latency_figure as drawn  # matplotlib is slow to import

        return drawn(by_label, difference=True)

    alt = "Distribution functions of TTFT, TPOT and E2E of both runs, and the difference of their percentiles"
    drawn = kept((comparison.a, comparison.b), ("latency", *labels), lambda: latency_figure(by_label))
    figure("latency", drawn, on_paper, data, alt)
    if not all(len(samples(frame, "ttft_ms")) for frame in frames):
        note("One of the runs has completed no request yet.")


def _draw_requests(comparison: Comparison, frames: tuple[pd.DataFrame, pd.DataFrame], a: str, b: str) -> None:
    st.header("Request by request")
    labels = headings(comparison)

    def on_paper() -> Figure:
        from experiments.plots import scatter_figure as drawn

        return drawn(*frames, *labels)

    def data() -> pd.DataFrame:
        each = (request_pairs(*frames, column).assign(latency=title) for column, title in LATENCY_COLUMNS.items())
        return pd.concat(list(each))

    alt = "Each request's latencies in the second run over those in the first; the dotted diagonal is no difference"
    both = comparison.a, comparison.b
    figure("requests", kept(both, ("requests", *labels), lambda: scatter_figure(*frames, *labels)), on_paper, data, alt)
    if len(frames[0]) > POINTS:
        note(f"All {len(frames[0]):,} requests, counted in squares; the {SINGLED_OUT} that differ most are points.")
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute", key="worst"):
        st.header("Requests that differ most", width="content")
        column = segments("Latency", "by", LATENCY_COLUMNS, "e2e_ms")
    worst = request_pairs(*frames, column).head(WORST)
    name_a, name_b = (f"{LATENCY_COLUMNS[column]}, {label} (ms)" for label in labels)
    table(
        ["request", "prompt tokens", "output tokens", name_a, name_b, "difference (ms)", "difference"],
        [
            (
                f"request {request}",
                f"{prompt:,}",
                f"{output:,}",
                format_figure(in_a),
                format_figure(in_b),
                f"{difference:+,.1f}",
                f"{difference / in_a:+.1%}" if in_a else "–",
            )
            for request, prompt, output, in_a, in_b, difference in zip(
                *(worst[name].tolist() for name in worst), strict=True
            )
        ],
        [f"timeline?{urlencode({'a': a, 'b': b, 'request': i})}" for i in worst["request_id"]],
    )
    downloads("worst", None, lambda: request_pairs(*frames, column))


def _draw_table(comparison: Comparison, noise: dict[str, float]) -> None:
    st.header("All figures")
    rows = comparison.rows()
    columns = ["metric", "unit", *_apart(*headings(comparison)), difference_heading(comparison)]
    cells = [(r.metric, r.unit, r.a, r.b, r.error) for r in rows]
    if noise:
        columns.append("noise floor")
        cells = [(*row, f"{noise[row[0]]:.1%}" if row[0] in noise else "–") for row in cells]  # type: ignore[misc]
    table(columns, cells)
    downloads("figures", None, lambda: pd.DataFrame(cells, columns=columns))
    for line in comparison.notes():
        note(line[0].upper() + line[1:] + ".")


def _labels(comparison: Comparison) -> tuple[str, str]:
    return _apart(comparison.a.label, comparison.b.label)


def _apart(a: str, b: str) -> tuple[str, str]:
    """Two headings that are not the same."""
    return (a, b) if a != b else (f"{a}, first", f"{b}, second")
