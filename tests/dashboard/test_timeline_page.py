"""The page "Timeline", run without a browser."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from experiments.life import request_life
from experiments.records import read_run
from tests.dashboard.reading import bodies, opened, table
from tests.experiments.fake_run import constant, fake_run, random_requests


def script(root: str) -> None:
    from pathlib import Path

    from dashboard import timeline_page

    timeline_page.show(Path(root))


def page(root: Path, **in_url: str) -> AppTest:
    return opened(AppTest.from_function(script, default_timeout=60, args=(str(root),)), **in_url)


def times(app: AppTest) -> list[float]:
    """The range of the time axis of the first figure."""
    figure = json.loads(app.get("plotly_chart")[0].proto.spec or app.get("plotly_chart")[0].proto.figure.spec)
    return [float(end) for end in figure["layout"]["xaxis"]["range"]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    requests = random_requests(60, seed=1)
    fake_run(folder / "gpu", requests, kind="real")
    fake_run(folder / "model", requests, step_ns=lambda step: constant(step) * 9 // 10)
    return folder


def test_both_runs_share_the_axis_of_the_longer_one(root: Path) -> None:
    app = page(root)
    ends = [read_run(root / name).steps["end_ns"].max() / 1e9 for name in ("gpu", "model")]
    assert times(app) == pytest.approx([0, max(ends)])
    assert len(app.get("plotly_chart")) == 2


def test_a_part_of_the_run_comes_from_the_url(root: Path) -> None:
    app = page(root, **{"from": "0.2", "to": "0.3"})
    assert times(app) == pytest.approx([0.2, 0.3])
    assert [button.label for button in app.button] == ["Zoom out", "Whole run"]
    app.button[0].click().run()
    assert times(app) == pytest.approx([0.15, 0.35])
    for nonsense in ({"from": "x"}, {"from": "5", "to": "1"}, {"to": "inf"}, {"from": "nan"}):
        assert times(page(root, **nonsense))[0] == 0


def test_a_request_of_the_url_is_followed_in_both_runs(root: Path) -> None:
    app = page(root, request="7")
    assert app.number_input[0].value == 7
    headings, cells = table(app, "run")
    lives = [request_life(read_run(root / name), 7) for name in ("gpu", "model")]
    waiting = headings.index("waiting (ms)")
    assert [row[waiting] for row in cells] == [f"{life.total_ns('waiting') / 1e6:,.1f}" for life in lives]
    shown = html.unescape("\n".join(bodies(app)))
    assert all(sentence in shown for life in lives for sentence in life.sentences())


def test_without_a_choice_it_is_the_one_that_waited_longest(root: Path) -> None:
    run = read_run(root / "gpu")
    waited = run.requests["first_scheduled_ns"] - run.requests["arrival_ns"]
    assert page(root).number_input[0].value == run.requests["request_id"][int(waited.argmax())]


def test_a_request_that_is_not_there_is_said(root: Path) -> None:
    app = page(root, request="12345")
    assert len(app.warning) == 2
    assert len(app.get("plotly_chart")) == 1


def test_one_run_is_enough_and_none_is_said(tmp_path: Path) -> None:
    assert "no run" in page(tmp_path).info[0].value
    fake_run(tmp_path / "only", random_requests(5, seed=1))
    assert len(page(tmp_path).get("plotly_chart")) == 2
