"""A tuning: the same points each time, gone on with from what is there, and the front is what nobody beats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.spec import SpecError
from experiments.tuning.output import figure, markdown, write
from experiments.tuning.search import read_tuning, search
from tests.experiments.test_sweeps import BASE, Here

pytest.importorskip("optuna")

CONTENT: dict[str, Any] = {
    "base": BASE,
    "search": {"limits.max_num_seqs": {"low": 1, "high": 4}, "policies.queue": ["fcfs", {"name": "sjf"}]},
    "objectives": [
        {"metric": "p99_ttft_ms", "better": "lower"},
        {"metric": "request_throughput", "better": "higher"},
    ],
    "trials": 4,
    "at_once": 2,
}


def test_a_search_is_a_function_of_its_file_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    tuning = read_tuning(CONTENT)
    with pytest.raises(KeyboardInterrupt):
        search(tuning, tmp_path / "tuned", Here(stop_after=1))
    rest = Here()
    trials = search(tuning, tmp_path / "tuned", rest)
    whole = Here()
    assert search(tuning, tmp_path / "whole", whole) == trials
    assert len(rest.ran) == len(whole.ran) - 1
    assert search(tuning, tmp_path / "whole", Here(stop_after=0)) == trials  # nothing is run again
    assert [trial.number for trial in trials] == list(range(4))
    for trial in trials:
        ttft, throughput = trial.figures
        beaten = any(t.figures != trial.figures and t.figures[0] <= ttft and t.figures[1] >= throughput for t in trials)
        assert trial.best != beaten
    write(trials, tuning.spec, tmp_path)
    frame = pd.read_parquet(tmp_path / "trials.parquet")
    assert frame["best"].tolist() == [trial.best for trial in trials]
    assert frame["p99_ttft_ms"].tolist() == [trial.figures[0] for trial in trials]
    assert (tmp_path / "front.png").stat().st_size > 1000
    page = markdown(trials, tuning.spec)
    assert page.count("\n| ") == 2 + len({repr(trial.values) for trial in trials if trial.best})


def test_one_objective_has_one_best_figure_and_a_point_that_fails_is_passed_over(tmp_path: Path) -> None:
    content = {
        **CONTENT,
        "search": {"limits.block_size": [16, 4096], "limits.max_num_seqs": {"low": 1, "high": 8, "log": True}},
        "objectives": [{"metric": "mean_ttft_ms", "better": "lower"}],
        "trials": 4,
        "seed": 1,
    }
    with pytest.raises(SpecError, match=r"limits\.block_size"):  # the second choice is no block size at all
        read_tuning({**content, "search": {"limits.block_size": [4096]}})
    tuning = read_tuning(content)
    trials = search(tuning, tmp_path, Here())
    failed = [trial for trial in trials if trial.values["limits.block_size"] == 4096]
    assert failed
    assert all("limits.block_size" in trial.error and not trial.best for trial in failed)
    best = [trial.figures[0] for trial in trials if trial.best]
    assert set(best) == {min(trial.figures[0] for trial in trials if trial.figures)}
    assert figure(trials, tuning.spec).axes[0].get_xlabel() == "trial"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"search": {"limits.max_num_seqs": {"low": 4, "high": 4}}}, "must be below high"),
        ({"search": {"limits.max_num_sequences": [1]}}, "unknown field"),
        ({"search": {"limits.max_num_seqs": {"low": 4, "hihg": 8}}}, "search.limits.max_num_seqs.hihg: unknown field"),
        ({"search": {"policies.queue": ["fifo"]}}, "there is no queue 'fifo'"),
        ({"objectives": []}, "objectives"),
        ({"objectives": [{"metric": "x", "better": "more"}]}, "'lower' or 'higher'"),
        ({"tries": 5}, "did you mean 'trials'"),
    ],
)
def test_what_cannot_be_searched_is_refused(change: dict[str, Any], what: str, tmp_path: Path) -> None:
    path = tmp_path / "tune.yaml"
    path.write_text(json.dumps({**CONTENT, **change}))
    with pytest.raises(SpecError, match=what) as caught:
        read_tuning(path)
    assert str(caught.value).startswith(f"{path}:1: ")


def test_a_figure_that_no_run_has_is_refused_by_name(tmp_path: Path) -> None:
    tuning = read_tuning({**CONTENT, "objectives": [{"metric": "p99_tttf_ms", "better": "lower"}]})
    with pytest.raises(SpecError, match=r"no figure p99_tttf_ms; they have .*p99_ttft_ms"):
        search(tuning, tmp_path, Here())
