"""Figures show what the records say, and the same runs give the same files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from experiments.compare import compare
from experiments.metrics import per_request, timeline
from experiments.plots import latency_figure, save_figures, scatter_figure, timeline_figure
from experiments.records import Run
from experiments.series import cdf, over_time
from tests.experiments.fake_run import constant, fake_run, random_requests


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    folder = tmp_path_factory.mktemp("runs")
    requests = random_requests(60, seed=1, cancelled=0.1)
    return (
        fake_run(folder / "gpu", requests, kind="real"),
        fake_run(folder / "model", requests, step_ns=lambda step: constant(step) * 9 // 10),
    )


def xy(line: Line2D) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.asarray(line.get_xdata(), np.float64), np.asarray(line.get_ydata(), np.float64)


def texts(figure: Figure) -> list[str]:
    return [text for axis in figure.axes for text in (axis.get_xlabel(), axis.get_ylabel(), axis.get_title())]


def test_latency_curves_are_the_shares_of_requests(runs: tuple[Run, Run]) -> None:
    frames = {run.label: per_request(run) for run in runs}
    figure = latency_figure(frames)
    assert [axis.get_xlabel() for axis in figure.axes] == ["TTFT (ms)", "TPOT (ms)", "E2E (ms)"]
    for axis, column in zip(figure.axes, ["ttft_ms", "tpot_ms", "e2e_ms"], strict=True):
        assert [line.get_label() for line in axis.lines] == ["gpu (real)", "model (sim)"]
        for line, frame in zip(axis.lines, frames.values(), strict=True):
            values = frame.loc[frame["completed"], column].dropna()
            for x, y in zip(*xy(line), strict=True):
                below = float((values < x).mean()), float((values <= x).mean())
                assert below[0] - 1e-9 <= y <= below[1] + 1e-9


def test_the_timeline_has_a_line_a_run_with_the_recorded_states(runs: tuple[Run, Run]) -> None:
    frames = {run.label: timeline(run) for run in runs}
    figure = timeline_figure(frames)
    labels = ["running requests", "waiting requests", "KV blocks in use"]
    assert [axis.get_ylabel() for axis in figure.axes] == labels
    assert figure.axes[-1].get_xlabel() == "time since the run began (s)"
    for axis, column in zip(figure.axes, ["running", "waiting", "kv_blocks"], strict=True):
        for line, frame in zip(axis.lines, frames.values(), strict=True):
            x, y = xy(line)
            assert np.array_equal(y, frame[column])
            assert np.allclose(x, frame["t_ns"] / 1e9)


def test_the_scatter_has_a_point_a_request_and_a_diagonal(runs: tuple[Run, Run]) -> None:
    a, b = map(per_request, runs)
    figure = scatter_figure(a, b, "real", "simulated")
    both = a[a["completed"]].merge(b[b["completed"]], on="request_id")
    points = np.asarray(figure.axes[2].collections[0].get_offsets(), np.float64)
    assert np.allclose(points, both[["e2e_ms_x", "e2e_ms_y"]])
    (diagonal,) = figure.axes[2].lines
    assert np.array_equal(*xy(diagonal))
    assert {"real", "simulated", f"E2E (ms), {len(both)} requests"} <= set(texts(figure))


def test_the_same_runs_give_the_same_bytes(runs: tuple[Run, Run], tmp_path: Path) -> None:
    comparison = compare(*runs)
    paths = save_figures(comparison, tmp_path / "a")
    again = save_figures(comparison, tmp_path / "b")
    assert [path.name for path in paths] == [
        f"{name}.{suffix}" for name in ("latency_cdf", "timeline", "requests") for suffix in ("png", "svg")
    ]
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert b"<dc:date>" not in paths[1].read_bytes()


def test_a_figure_of_nothing_says_so(runs: tuple[Run, Run]) -> None:
    nothing = per_request(runs[0]).head(0)
    figure = latency_figure({"none": nothing})
    assert [axis.texts[0].get_text() for axis in figure.axes] == ["no data"] * 3
    figure = timeline_figure({"none": timeline(runs[0]).head(0)})
    assert [axis.texts[0].get_text() for axis in figure.axes] == ["no data"] * 3


@given(st.lists(st.floats(0, 1000), max_size=50), st.integers(2, 60))
def test_a_thinned_distribution_goes_through_the_whole_one(values: list[float], points: int) -> None:
    ascending = np.sort(np.array(values))
    x, y = cdf(ascending, points)
    if not values:
        assert len(x) == 0
        return
    assert len(x) <= points + 1
    assert (x[0], y[0], x[-1], y[-1]) == (ascending[0], 0, ascending[-1], 1)
    for at, share in zip(x[1:], y[1:], strict=True):
        assert (ascending < at).mean() <= share <= (ascending <= at).mean()


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 9)), min_size=2, max_size=60), st.integers(2, 20))
def test_a_thinned_timeline_keeps_averages_and_extremes(changes: list[tuple[int, int]], points: int) -> None:
    t_ns = np.cumsum([duration for duration, _ in changes]) * 1000
    value = np.array([v for _, v in changes])
    value[-1] = value[-2]  # the last row closes the last span
    frame = pd.DataFrame({"t_ns": t_ns, "running": value})
    spans = over_time(frame, "running", points)
    assert len(spans) <= max(len(frame), points + 1)
    edges = spans["t_s"].to_numpy()
    assert (edges[0], edges[-1]) == (t_ns[0] / 1e9, t_ns[-1] / 1e9)
    area = np.dot(value[:-1], np.diff(t_ns)) / 1e9
    assert np.dot(spans["mean"][:-1], np.diff(edges)) == pytest.approx(area, rel=1e-6, abs=1e-12)
    assert spans["high"].max() == value[:-1].max()
    assert spans["low"].min() == value[:-1].min()
    assert (spans["low"] <= spans["mean"] + 1e-9).all()
    assert (spans["mean"] <= spans["high"] + 1e-9).all()
