"""Figures on the screen show every request, and are marked so that they are drawn once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dashboard import keeping, theme
from dashboard.figures import POINTS, SINGLED_OUT, scatter_figure
from dashboard.timeline_figures import timeline_figure
from dashboard.ui import revised
from experiments.composition import composition
from experiments.records import Run
from experiments.timeline import states
from policies.stack import StackSpec
from tests.experiments.fake_run import LIMITS, fake_run, random_requests


def frame(count: int, seed: int, wide: bool = False) -> pd.DataFrame:
    """As of `per_request`; `wide`: over decades."""
    draw = np.random.default_rng(seed)
    values = {name: draw.lognormal(3, 2 if wide else 0.1, count) for name in ("ttft_ms", "tpot_ms", "e2e_ms")}
    about = {"request_id": np.arange(count), "completed": True, "prompt_tokens": 1, "output_tokens": 1}
    return pd.DataFrame({**about, **values})


@pytest.mark.parametrize("wide", [False, True], ids=["linear", "logarithmic"])
def test_of_many_requests_each_is_in_a_square_and_the_most_different_are_points(wide: bool) -> None:
    a, b = frame(3 * POINTS, 1, wide), frame(3 * POINTS, 2, wide)
    figure = scatter_figure(a, b, "a", "b")
    squares = [trace for trace in figure.data if trace.type == "heatmap"]
    points = [trace for trace in figure.data if trace.type == "scatter" and trace.mode == "markers"]
    assert [int(trace.customdata.sum()) for trace in squares] == [3 * POINTS] * 3
    difference = (b["ttft_ms"] - a["ttft_ms"]).abs().nlargest(SINGLED_OUT)
    assert set(points[0].customdata) == set(difference.index)
    assert {axis.type for axis in figure.select_xaxes()} == ({"log"} if wide else {None})


def test_of_few_requests_each_is_a_point() -> None:
    figure = scatter_figure(frame(POINTS, 1), frame(POINTS, 2), "a", "b")
    assert [trace.type for trace in figure.data] == ["scatter"] * 6
    assert len(figure.data[1].x) == POINTS


def test_the_mark_of_a_figure_changes_with_its_data_and_with_nothing_else() -> None:
    marks = [revised(scatter_figure(frame(9, 1), frame(9, seed), "a", "b")).layout.datarevision for seed in (2, 2, 3)]
    assert marks[0] == marks[1] != marks[2]


def test_a_figure_is_made_once_for_a_light_and_once_for_a_dark_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [fake_run(tmp_path / name, random_requests(3, seed=1)) for name in ("a", "b")]
    made: list[str] = []
    for page, pair, what in (("light", runs, 1), ("light", runs, 1), ("dark", runs, 1), ("dark", runs[::-1], 1)):
        monkeypatch.setattr(theme, "dark", lambda page=page: page == "dark")
        keeping.kept(pair, what, lambda: made.append("x") or scatter_figure(frame(2, 1), frame(2, 2), "a", "b"))
    assert len(made) == 3


@pytest.fixture(scope="module")
def swapping(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fake_run(
        tmp_path_factory.mktemp("swap") / "run",
        limits=replace(LIMITS, num_host_blocks=30),
        stack=StackSpec(preemption="last_admitted,mode=swap"),
    )


def test_a_run_with_a_host_tier_shows_its_occupancy_and_what_was_moved(swapping: Run) -> None:
    over_time, end = states(swapping), int(swapping.steps["end_ns"].max())
    used = 30 - swapping.steps["free_host_blocks"]
    assert over_time["host_share"].max() == pytest.approx(100 * used.max() / 30)
    assert used.max() > 0
    steps = composition(swapping, 0, end + 1)
    for way in ("swapped_out", "swapped_in"):
        assert steps[way][:-1].sum() == swapping.steps[way].sum() > 0
    titles = [axis.title.text for axis in timeline_figure({"run": steps}, {"run": over_time}, 0, 1).select_yaxes()]
    assert [title for title in titles if "host" in title or "swapped" in title] == [
        "host KV blocks<br>in use (%)",
        "swapped out,<br>−in (tokens)",
    ]
