"""The page "Policies", run without a browser."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from experiments.compare import format_figure
from experiments.metrics import summarize
from experiments.records import read_run
from tests.dashboard.reading import bodies, opened, table
from tests.experiments.fake_run import constant, fake_run, random_requests


def script(root: str) -> None:
    from pathlib import Path

    from dashboard import policies_page

    policies_page.show(Path(root))


def page(root: Path, **in_url: str) -> AppTest:
    return opened(AppTest.from_function(script, default_timeout=60, args=(str(root),)), **in_url)


def turn(folder: Path, scheduler: str, rate: float) -> None:
    """Write into a run's specification what it would have been made with."""
    about = json.loads((folder / "run.json").read_text())
    about["spec"] = {"workload": {"name": "test", "rate": rate}, "policies": {"scheduler": scheduler}}
    (folder / "run.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies in both panels, a third in one; the policies are names for how long their steps take."""
    runs = tmp_path_factory.mktemp("runs")
    requests = random_requests(30, seed=1)
    for policy, times in (("quick", 1), ("slow", 2), ("slower", 3)):
        for kind in ("real", "sim"):
            if (policy, kind) != ("slower", "real"):
                folder = runs / f"{policy}-{kind}"
                fake_run(folder, requests, kind=kind, step_ns=lambda step, times=times: constant(step) * times)
                turn(folder, policy, 2.0)
    return runs


@pytest.fixture
def own(root: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return shutil.copytree(root, tmp_path / "own")


def test_policies_are_ranked_in_each_panel_and_it_is_said_whether_these_agree(root: Path) -> None:
    app = page(root, objective="p99_ttft_ms")
    _, cells = table(app, "policy")
    ttft = [format_figure(summarize(read_run(root / f"{name}-real"))["p99_ttft_ms"]) for name in ("quick", "slow")]
    assert cells == [["quick", "1", "1", ttft[0], ttft[0]], ["slow", "2", "2", ttft[1], ttft[1]]]
    assert any("both put the same policy first; Kendall" in body for body in bodies(app))


def test_that_a_rank_is_by_a_mean_of_several_runs_is_said(root: Path, own: Path) -> None:
    several = "ran several times in one panel"
    assert not any(several in body for body in bodies(page(root)))
    shutil.copytree(own / "quick-real", own / "quick-real-again")
    assert any(several in body for body in bodies(page(own)))


def test_all_runs_are_in_the_table_best_first_and_lead_to_their_timelines(root: Path) -> None:
    app = page(root, objective="output_throughput")
    _, cells = table(app, "run")
    assert [row[0] for row in cells] == ["quick-real", "quick-sim", "slow-real", "slow-sim", "slower-sim"]
    assert any('href="timeline?a=quick-real"' in body for body in bodies(app))


def charts(app: AppTest) -> list[str]:
    return [chart.key for chart in app.get("plotly_chart")]


def test_two_knobs_make_a_map_and_two_loads_a_curve_and_one_does_not(own: Path) -> None:
    assert charts(page(own)) == ["figure:pareto"]
    for at, (size, rate) in enumerate([(128, 1.0), (256, 1.0), (128, 2.0), (256, 2.0)]):
        fake_run(own / f"sweep{at}", random_requests(5, seed=at))
        turn(own / f"sweep{at}", f"sarathi,chunk_size={size}", rate)
    app = page(own, workload="all workloads")
    assert charts(app) == ["figure:pareto", "figure:capacity", "figure:knobs"]
    assert [app.selectbox(key="x").value, app.selectbox(key="y").value] == [
        "policies.scheduler.chunk_size",
        "workload.rate",
    ]


def test_only_runs_with_the_words_of_the_filter_are_left(root: Path) -> None:
    app = page(root, only="Slow real")
    assert [row[0] for row in table(app, "run")[1]] == ["slow-real"]
    assert "No run of this workload has 'fast'" in page(root, only="fast").info[0].value
    app.text_input(key="only").set_value("").run()
    assert len(table(app, "run")[1]) == 5
    assert "only" not in app.query_params


def test_a_broken_run_is_named_and_the_others_are_shown(own: Path) -> None:
    (own / "slow-sim" / "steps.parquet").write_bytes(b"nonsense")
    app = page(own)
    assert "slow\\-sim" in app.warning[0].value
    assert len(table(app, "run")[1]) == 4


def test_an_empty_folder_says_how_to_fill_it(tmp_path: Path) -> None:
    assert "no real or simulated run" in page(tmp_path).info[0].value
