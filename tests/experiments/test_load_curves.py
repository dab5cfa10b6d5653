"""A capacity curve goes through the mean of the runs at each rate, for each policy and panel apart."""

from __future__ import annotations

from typing import Any

from experiments.load_curves import load_curves, same_workload


def row(kind: str, policy: str, rate: float | None, value: float | None, **knobs: Any) -> dict[str, Any]:
    turned = {"workload.name": "chat", "workload.rate": rate, **{f"workload.{k}": v for k, v in knobs.items()}}
    return {"kind": kind, "policy": policy, "p99": value, "knobs": {k: v for k, v in turned.items() if v is not None}}


def test_a_line_goes_through_the_mean_of_the_runs_at_each_rate_in_order() -> None:
    rows = [row("sim", "a", 8.0, 50.0), row("sim", "a", 2.0, 10.0), row("sim", "a", 2.0, 20.0, seed=1)]
    curves = load_curves([*rows, row("real", "a", 2.0, 7.0), row("real", "a", 4.0, 9.0)], "p99")
    assert curves.to_numpy().tolist() == [
        ["real", "a", 2.0, 7.0, 1],
        ["real", "a", 4.0, 9.0, 1],
        ["sim", "a", 2.0, 15.0, 2],
        ["sim", "a", 8.0, 50.0, 1],
    ]


def test_one_rate_makes_no_curve_and_what_is_unknown_no_point() -> None:
    rows = [row("sim", "once", 2.0, 1.0), row("sim", "once", 2.0, 3.0), row("sim", "trace", None, 1.0)]
    assert load_curves(rows, "p99").empty
    assert load_curves([*rows, row("sim", "once", 3.0, None)], "p99").empty
    assert load_curves([], "p99").columns.tolist() == ["kind", "policy", "rate", "value", "runs"]


def test_runs_of_one_curve_differ_in_how_many_requests_come_how_fast_and_in_no_length() -> None:
    assert same_workload(row("sim", "a", 2.0, 1.0, n=10)) == same_workload(row("real", "b", 4.0, 2.0, n=20, seed=3))
    assert same_workload(row("sim", "a", 2.0, 1.0)) != same_workload(row("sim", "a", 2.0, 1.0, length_scale=0.5))


def test_arrivals_that_were_moved_together_came_faster() -> None:
    rows = [row("sim", "a", 10.0, 1.0), row("sim", "a", 10.0, 3.0, time_scale=0.5)]
    assert load_curves(rows, "p99")[["rate", "value"]].to_numpy().tolist() == [[10.0, 1.0], [20.0, 3.0]]
    assert same_workload(rows[0]) == same_workload(rows[1])


def test_two_models_make_two_curves() -> None:
    other = row("sim", "a", 2.0, 1.0)
    other["knobs"]["model.source"] = "tiny"
    assert same_workload(other) != same_workload(row("sim", "a", 2.0, 1.0))
