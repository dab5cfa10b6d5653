"""A study's table says what each run came to; fronts and ranks are what their definitions say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.metrics import per_request, summarize
from experiments.study import agreement, grid, knobs, pareto, policy_name, study_row, turned, workload_name
from tests.experiments.fake_run import fake_run, random_requests


def table(*rows: tuple[str, str, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["policy", "kind", "p99_ttft_ms"])


def test_a_row_has_the_figures_of_the_summary(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", random_requests(40, seed=1))
    row, summary = study_row(run), summarize(run)
    for name in ("output_throughput", "p99_ttft_ms", "median_e2el_ms", "preemptions"):
        assert row[name] == summary[name]
    assert row["kv_share"] == 100 * summary["mean_kv_blocks"] / 40
    frame = per_request(run)[lambda f: f["completed"]]
    speed = (frame["e2e_ms"] / frame["output_tokens"]).to_numpy()
    assert row["fairness"] == pytest.approx(speed.sum() ** 2 / (len(speed) * (speed**2).sum()))
    assert row["service_difference"] is None


coordinates = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12)


@given(coordinates, st.booleans(), st.booleans())
def test_the_front_is_what_nobody_beats(points: list[tuple[int, int]], lower_x: bool, lower_y: bool) -> None:
    x, y = (np.array([point[axis] for point in points], np.float64) for axis in (0, 1))
    sign_x, sign_y = (1 if lower_x else -1), (1 if lower_y else -1)

    def beats(i: int, j: int) -> bool:
        better = sign_x * x[i] <= sign_x * x[j] and sign_y * y[i] <= sign_y * y[j]
        return bool(better and (x[i] != x[j] or y[i] != y[j]))

    slow = [not any(beats(i, j) for i in range(len(points))) for j in range(len(points))]
    assert pareto(x, y, lower_x, lower_y).tolist() == slow


def test_what_is_unknown_is_on_no_front() -> None:
    x, y = np.array([np.nan, 1.0, 2.0]), np.array([0.0, np.nan, 5.0])
    assert pareto(x, y, True, True).tolist() == [False, False, True]


def test_panels_agree_where_they_rank_alike() -> None:
    rows = [("a", "real", 1.0), ("b", "real", 2.0), ("c", "real", 3.0)]
    same = agreement(table(*rows, ("a", "sim", 10.0), ("b", "sim", 20.0), ("c", "sim", 30.0)), "p99_ttft_ms")
    assert (same.tau, same.same_best) == (1.0, True)
    other = agreement(table(*rows, ("a", "sim", 30.0), ("b", "sim", 20.0), ("c", "sim", 10.0)), "p99_ttft_ms")
    assert (other.tau, other.same_best) == (-1.0, False)
    assert other.ranking["rank_sim"].to_dict() == {"a": 3, "b": 2, "c": 1}
    one = agreement(table(*rows, ("b", "sim", 4.0), ("d", "sim", 1.0)), "p99_ttft_ms")
    assert one.tau is None
    assert "1 policy in both" in str(one)


def test_repeats_of_a_policy_count_by_their_mean() -> None:
    found = agreement(
        table(("a", "real", 1.0), ("a", "real", 5.0), ("b", "real", 2.0), ("a", "sim", 1.0), ("b", "sim", 2.0)),
        "p99_ttft_ms",
    )
    assert found.ranking["rank_real"].to_dict() == {"b": 1, "a": 2}


def test_knobs_are_found_by_path_and_only_those_that_were_turned() -> None:
    specs = [
        {"workload": {"name": "chat", "rate": rate}, "policies": {"scheduler": f"sarathi,chunk_size={size}"}}
        for rate, size in ((4.0, 128), (4.0, 256), (8.0, 128))
    ]
    rows = [
        {"knobs": dict(knobs(spec)), "p99_ttft_ms": value} for spec, value in zip(specs, (1.0, 2.0, 3.0), strict=True)
    ]
    assert turned(rows) == ["policies.scheduler.chunk_size", "workload.rate"]
    cells = grid(rows, "policies.scheduler.chunk_size", "workload.rate", "p99_ttft_ms")
    assert cells.columns.tolist() == [128.0, 256.0]
    assert cells.loc[4.0].tolist() == [1.0, 2.0]
    assert cells.loc[8.0, 128.0] == 3.0
    assert np.isnan(cells.loc[8.0, 256.0])


def test_names_tell_apart_what_differs() -> None:
    chat = {"name": "chat", "n": 10, "rate": 2.0, "seed": 1}
    assert workload_name({"workload": chat}) == "chat, n=10, rate=2, seed=1"
    longer = workload_name({"workload": {**chat, "length_scale": 0.1}})
    assert longer.startswith("chat, n=10, rate=2, seed=1 [")
    assert longer != workload_name({"workload": {**chat, "length_scale": 0.2}})
    assert (
        policy_name({"policies": {"scheduler": "sarathi", "queue": "sjf", "router": "round_robin"}}) == "sarathi + sjf"
    )
    assert policy_name({"policies": {"scheduler": "mixed", "queue": "fcfs"}}) == "mixed"
