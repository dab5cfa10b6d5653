"""The page "Compare", run without a browser."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from dashboard.ui import plain
from experiments.attribution import attribute
from experiments.cli import look
from experiments.compare import compare, format_figure
from experiments.metrics import per_request
from experiments.records import read_run
from tests.dashboard.reading import bodies, opened, table
from tests.experiments.fake_run import constant, fake_run, random_requests
from tests.experiments.test_attribution import Off
from tests.experiments.test_fidelity_simulated import record

APP = Path(__file__).resolve().parents[2] / "dashboard" / "app.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a simulated and a real run of the same requests, and a second real one in a folder of its own."""
    folder = tmp_path_factory.mktemp("runs")
    requests = random_requests(60, seed=1, cancelled=0.1)
    fake_run(folder / "a model", requests, step_ns=lambda step: constant(step) * 9 // 10)
    fake_run(folder / "gpu", requests, kind="real")
    fake_run(folder / "sweep" / "1", requests[:-5], kind="real")
    about = folder / "sweep" / "1" / "run.json"
    about.write_text(about.read_text().replace('"seed": 0', '"seed": 1'))  # no repeat of the other
    return folder


@pytest.fixture
def own(root: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return shutil.copytree(root, tmp_path / "own")


def page(root: Path, monkeypatch: pytest.MonkeyPatch, **in_url: str) -> AppTest:
    monkeypatch.setattr(sys, "argv", ["app.py"])
    monkeypatch.setenv("DIPTYCH_RUNS", str(root))
    return opened(AppTest.from_file(str(APP), default_timeout=60), **in_url)


def test_a_simulation_of_another_model_is_said_to_be_one_above_the_figures(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "What ran: gpu served small, a model simulates big by the data sheet of l4"
    assert not any(said in body for body in bodies(page(own, monkeypatch)))
    cost = {"kind": "roofline", "model": {"name": "big"}, "device": {"name": "l4"}}
    for name, more in (("gpu", {"model": "small"}), ("a model", {"cost": cost})):
        about = own / name / "run.json"
        about.write_text(json.dumps({**json.loads(about.read_text()), **more}))
    shown = bodies(page(own, monkeypatch))
    first = next(i for i, body in enumerate(shown) if said in body)
    assert first < next(i for i, body in enumerate(shown) if "Policy: " in body)


def test_a_real_and_a_simulated_run_are_chosen_at_first(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = page(root, monkeypatch)
    reference, other = app.selectbox
    assert reference.value == "gpu"
    assert other.value == "a model"
    assert other.options == ["a model (sim)", "gpu (real)", "sweep/1 (real)"]


def test_the_figures_are_those_of_the_command_line_to_the_last_digit(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = page(root, monkeypatch)
    comparison = compare(read_run(root / "gpu"), read_run(root / "a model"))
    headings, cells = table(app, "metric")
    assert headings == ["metric", "unit", "real", "simulated", "error"]
    assert cells == [[row.metric, row.unit, row.a, row.b, row.error] for row in comparison.rows()]
    tiles = next(body for body in bodies(app) if "dp-tiles" in body)
    by_metric = {row.metric: row for row in comparison.rows()}
    for metric in ("Output tokens", "TTFT p50", "TPOT p50", "E2E p50"):
        row = by_metric[metric]
        start = tiles.index(f">{metric} ({row.unit})<")
        shown = re.findall(r">([^<>]+)<", tiles[start:])
        assert shown[1:4] == [row.error, row.a, row.b]


def test_repeats_of_the_reference_run_say_what_a_difference_is_worth(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = random_requests(60, seed=1, cancelled=0.1)
    again = fake_run(own / "gpu again", requests, kind="real", step_ns=lambda step: constant(step) * 11 // 10)
    apart = {row.metric: row.error for row in compare(read_run(own / "gpu"), again).rows()}
    app = page(own, monkeypatch)
    headings, cells = table(app, "metric")
    assert headings[-1] == "noise floor"
    assert {row[0]: row[-1] for row in cells} == {metric: error.lstrip("+-") for metric, error in apart.items()}
    assert any(f"noise floor {apart['TTFT p50'].lstrip('+-')}, 1 repeat<" in body for body in bodies(app))


def test_the_requests_that_differ_most_lead_to_their_lives(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = page(root, monkeypatch, by="ttft_ms")
    a, b = (per_request(read_run(root / name)).set_index("request_id") for name in ("gpu", "a model"))
    both = a["completed"] & b["completed"]
    difference = (b["ttft_ms"] - a["ttft_ms"])[both].abs()
    _, cells = table(app, "request")
    assert cells[0][0] == f"request {difference.idxmax()}"
    assert cells[0][-2].lstrip("+-") == f"{difference.max():,.1f}"
    assert any(f'href="timeline?a=gpu&amp;b=a+model&amp;request={difference.idxmax()}"' in body for body in bodies(app))


def test_the_url_carries_the_choice(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = page(root, monkeypatch, a="sweep/1", b="gpu")
    assert [box.value for box in app.selectbox] == ["sweep/1", "gpu"]
    app.selectbox[1].select("a model").run()
    assert app.query_params["a"] == "sweep/1"
    assert app.query_params["b"] == "a model"
    app.query_params["b"] = "gpu"
    app.run()
    assert app.selectbox[1].value == "gpu"
    assert page(root, monkeypatch, a="../gpu").selectbox[0].value == "gpu"


def test_a_link_to_what_is_not_there_is_answered_in_words(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = page(root, monkeypatch, a="gone", b="a model")
    assert [warning.value for warning in app.warning] == [
        plain("The link asks for a=gone, which is not there; here is gpu.")
    ]
    app.run()
    assert not app.warning


def test_it_is_said_whether_the_runs_decided_alike(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    divergence = compare(read_run(root / "gpu"), read_run(root / "sweep/1")).divergence
    assert divergence is not None
    app = page(root, monkeypatch, b="sweep/1")
    assert any(f"Policy: {divergence}." in body for body in bodies(app))
    assert f"step {divergence.step}" in app.expander[0].label
    shown = "\n".join(text.value for text in app.expander[0].text)
    assert all(decision in shown for decision in (*divergence.decisions_a, *divergence.decisions_b))


def test_both_figures_are_drawn_with_a_trace_a_run_and_panel(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    charts = page(root, monkeypatch).get("plotly_chart")
    assert len(charts) == 2


def test_two_times_the_same_run_is_no_comparison(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "two different runs" in page(root, monkeypatch, b="gpu").info[0].value


def test_without_runs_the_page_says_how_to_get_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no run" in page(tmp_path, monkeypatch).info[0].value
    fake_run(tmp_path / "only", random_requests(3, seed=1))
    assert "one run, only" in page(tmp_path, monkeypatch).info[0].value


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nowhere" in page(tmp_path / "nowhere", monkeypatch).error[0].value


def test_a_run_without_a_file_is_named_and_the_others_are_shown(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "sweep" / "1" / "steps.parquet").unlink()
    app = page(own, monkeypatch)
    assert "steps\\.parquet is missing" in app.warning[0].value
    assert app.selectbox[0].options == ["a model (sim)", "gpu (real)"]
    assert len(app.get("plotly_chart")) == 2


def test_a_broken_file_is_said_in_place_of_the_figures(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "gpu" / "steps.parquet").write_bytes(b"nonsense")
    app = page(own, monkeypatch)
    assert "is broken" in app.error[0].value
    assert not app.get("plotly_chart")


def test_a_run_that_changes_on_disk_is_read_again(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = page(own, monkeypatch)
    _, before = table(app, "metric")
    shutil.rmtree(own / "a model")
    fake_run(own / "a model", random_requests(60, seed=1), step_ns=lambda step: constant(step) * 2)
    app.run()
    _, after = table(app, "metric")
    assert any(old[2] == new[2] for old, new in zip(before, after, strict=True))
    assert all(old[3] != new[3] for old, new in zip(before, after, strict=True))


def test_names_are_shown_as_they_are_and_not_as_markdown() -> None:
    assert plain("a_b*c [x](y) $z$") == "a\\_b\\*c \\[x\\]\\(y\\) \\$z\\$"


def test_goodput_by_objectives_of_the_url_is_that_of_the_command_line(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = per_request(read_run(root / "gpu"))
    ttft = float(frame["ttft_ms"].median())
    app = page(root, monkeypatch, **{"slo-ttft": str(ttft), "slo-e2e": "2500", "slo-tpot": "nonsense"})
    saved = tmp_path / "numbers.json"
    look.compare(root / "gpu", root / "a model", json=saved, goodput=[f"ttft:{ttft}", "e2el:2500"])
    pair = json.loads(saved.read_text())["throughputs"]["request_goodput"]
    done = frame[frame["completed"] & (frame["ttft_ms"] <= ttft) & (frame["e2e_ms"] <= 2500)]
    run = read_run(root / "gpu")
    duration = (run.requests["finish_ns"].max() - run.requests["arrival_ns"].min()) / 1e9
    assert 0 < pair["a"] == len(done) / duration < len(frame) / duration
    _, cells = table(app, "metric")
    row = next(cells for cells in cells if cells[0] == "Goodput within limits")
    assert row[2:4] == [format_figure(pair["a"]), format_figure(pair["b"])]
    assert any("Goodput within limits (req/s)" in body for body in bodies(app))
    assert [box.value for box in app.number_input] == [ttft, None, 2500.0]
    assert "slo-tpot" not in app.query_params


def test_what_an_error_comes_from_is_shown_of_a_real_run_and_its_simulation_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path / "real", 1.0, Off(attention=1.2))
    record(tmp_path / "sim", 1.0)
    without = page(tmp_path, monkeypatch, a="real", b="sim")
    assert not any("queueing" in body for body in bodies(without))
    about = tmp_path / "real" / "run.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "kind": "real"}))
    found = attribute(read_run(tmp_path / "real"), read_run(tmp_path / "sim"))
    assert table(page(tmp_path, monkeypatch, a="real", b="sim"), "mean") == (found.heads(), found.rows())
