"""The page "Compare", run without a browser."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from dashboard.compare_page import plain
from experiments.compare import compare
from experiments.records import read_run
from tests.experiments.fake_run import constant, fake_run, random_requests

APP = Path(__file__).resolve().parents[2] / "dashboard" / "app.py"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a simulated and a real run of the same requests, and a second real one in a folder of its own."""
    requests = random_requests(60, seed=1, cancelled=0.1)
    fake_run(tmp_path / "a model", requests, step_ns=lambda step: constant(step) * 9 // 10)
    fake_run(tmp_path / "gpu", requests, kind="real")
    fake_run(tmp_path / "sweep" / "1", requests[:-5], kind="real")
    return tmp_path


def page(root: Path, monkeypatch: pytest.MonkeyPatch) -> AppTest:
    monkeypatch.setattr(sys, "argv", ["app.py"])
    monkeypatch.setenv("DIPTYCH_RUNS", str(root))
    app = AppTest.from_file(str(APP), default_timeout=60).run()
    assert not app.exception
    return app


def test_a_real_and_a_simulated_run_are_chosen_at_first(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = page(root, monkeypatch)
    reference, other = app.sidebar.selectbox
    assert reference.value == "gpu"
    assert other.value == "a model"
    assert other.options == ["a model (sim)", "gpu (real)", "sweep/1 (real)"]


def test_the_figures_are_those_of_the_command_line_to_the_last_digit(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = page(root, monkeypatch)
    comparison = compare(read_run(root / "gpu"), read_run(root / "a model"))
    table = app.dataframe[0].value
    assert list(table.columns) == ["metric", "unit", "real", "simulated", "error"]
    assert [tuple(row) for row in table.itertuples(index=False)] == [
        (row.metric, row.unit, row.a, row.b, row.error) for row in comparison.rows()
    ]
    by_metric = {row.metric: row for row in comparison.rows()}
    tiles = {tile.label: (tile.value, tile.delta) for tile in app.metric}
    for metric in ("Output tokens", "TTFT p50", "TPOT p50", "E2E p50"):
        row = by_metric[metric]
        assert tiles[f"{metric} ({row.unit})"] == (row.b, f"{row.error} against {row.a}")


def test_it_is_said_whether_the_runs_decided_alike(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = page(root, monkeypatch)
    divergence = compare(read_run(root / "gpu"), read_run(root / "sweep/1")).divergence
    assert divergence is not None
    app.sidebar.selectbox[1].select("sweep/1").run()
    assert not app.exception
    assert app.warning[0].value == plain(f"Policy: {divergence}.")
    assert f"step {divergence.step}" in app.expander[0].label
    shown = "\n".join(text.value for text in app.expander[0].text)
    assert all(decision in shown for decision in (*divergence.decisions_a, *divergence.decisions_b))


def test_both_figures_are_drawn_with_a_trace_a_run_and_panel(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    charts = page(root, monkeypatch).get("plotly_chart")
    assert len(charts) == 2


def test_two_times_the_same_run_is_no_comparison(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = page(root, monkeypatch)
    app.sidebar.selectbox[1].select("gpu").run()
    assert not app.exception
    assert "two different runs" in app.info[0].value


def test_without_runs_the_page_says_how_to_get_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no run" in page(tmp_path, monkeypatch).info[0].value
    fake_run(tmp_path / "only", random_requests(3, seed=1))
    assert "one run, only" in page(tmp_path, monkeypatch).info[0].value


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nowhere" in page(tmp_path / "nowhere", monkeypatch).error[0].value


def test_a_run_without_a_file_is_named_and_the_others_are_shown(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "sweep" / "1" / "steps.parquet").unlink()
    app = page(root, monkeypatch)
    assert "steps\\.parquet is missing" in app.sidebar.warning[0].value
    assert app.sidebar.selectbox[0].options == ["a model (sim)", "gpu (real)"]
    assert len(app.dataframe) == 1


def test_a_broken_file_is_said_in_place_of_the_figures(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "gpu" / "steps.parquet").write_bytes(b"nonsense")
    app = page(root, monkeypatch)
    assert "is broken" in app.error[0].value
    assert len(app.dataframe) == 0


def test_a_run_that_changes_on_disk_is_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = page(root, monkeypatch)
    before = app.dataframe[0].value
    shutil.rmtree(root / "a model")
    fake_run(root / "a model", random_requests(60, seed=1), step_ns=lambda step: constant(step) * 2)
    app.run()
    after = app.dataframe[0].value
    assert (before["real"] == after["real"]).any()
    assert (before["simulated"] != after["simulated"]).all()


def test_names_are_shown_as_they_are_and_not_as_markdown() -> None:
    assert plain("a_b*c [x](y) $z$") == "a\\_b\\*c \\[x\\]\\(y\\) \\$z\\$"
