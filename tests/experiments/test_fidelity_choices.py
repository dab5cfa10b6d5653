"""What a user would decide by the simulation: capacities, rankings and their noise, all by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.fidelity.capacity import saturated
from experiments.fidelity.choices import decided, regret, slo_capacity, tau
from experiments.fidelity.matrix import Cell
from experiments.fidelity.noise import half_widths
from experiments.fidelity.tables import missed
from experiments.spec import SpecError
from tests.experiments.rows import write_run


def latencies(values: np.ndarray, first_id: int = 0) -> pd.DataFrame:
    ids = np.arange(first_id, first_id + len(values))
    return pd.DataFrame({"request_id": ids, "completed": True, "ttft_ms": values, "tpot_ms": values, "e2e_ms": values})


def test_policies_that_differ_by_the_same_in_every_request_leave_no_doubt() -> None:
    values = np.random.default_rng(0).exponential(100.0, 300)
    frames = {"one": latencies(values), "other": latencies(values + 7.0)}
    for figure in ("mean_ttft", "p99_tpot", "mean_e2el"):
        assert half_widths(frames, figure)["one", "other"] == pytest.approx(0.0, abs=1e-9)


def test_the_doubt_about_a_mean_is_that_of_the_differences_and_not_of_the_latencies() -> None:
    draw = np.random.default_rng(1)
    values, apart = draw.normal(1000.0, 300.0, 400), draw.normal(0.0, 10.0, 400)
    width = half_widths({"one": latencies(values), "other": latencies(values + apart)}, "mean_ttft")["one", "other"]
    assert width == pytest.approx(1.96 * apart.std() / 400**0.5, rel=0.1)


def test_requests_are_paired_by_their_ids_and_those_without_a_latency_are_left_out() -> None:
    values = np.random.default_rng(2).exponential(100.0, 200)
    other = latencies(values + 7.0).sample(frac=1.0, random_state=0)
    other.loc[other["request_id"] == 3, "completed"] = False
    other.loc[other["request_id"] == 5, "tpot_ms"] = float("nan")
    other.loc[other["request_id"].isin((3, 5)), ["ttft_ms"]] = 1e9
    assert half_widths({"one": latencies(values), "other": other}, "mean_tpot")["one", "other"] < 1e-9
    assert half_widths({"one": latencies(values), "other": other}, "mean_ttft")["one", "other"] > 1e6  # 5 has one


def test_policies_that_share_no_request_cannot_be_told_apart() -> None:
    frames = {"one": latencies(np.ones(5)), "other": latencies(np.ones(5), first_id=5)}
    assert half_widths(frames, "mean_ttft") == {("one", "other"): float("inf")}


PAIRS = {"a": (100.0, 100.0), "b": (110.0, 120.0), "c": (130.0, 115.0), "d": (131.0, 90.0)}
"""Policy -> (real, simulated). Pairs but c-d are 10% apart or more in the real panel."""


def test_a_pair_counts_for_or_against_the_simulation_or_not_at_all() -> None:
    # Floor 2%: ab +, ac +, ad -, bc -, bd -; c and d tie.
    assert tau(PAIRS, 0.02, {}) == (-1 / 5, 5)
    # Floor 6%: b and c, 120 and 115, tie in the simulation: ab +, ac +, ad -, bc 0, bd -.
    assert tau(PAIRS, 0.06, {}) == (0.0, 5)
    assert tau({name: (real, 2 * real) for name, (real, _) in PAIRS.items()}, 0.0, {}) == (1.0, 6)
    assert tau({name: (real, -real) for name, (real, _) in PAIRS.items()}, 0.0, {}) == (-1.0, 6)


def test_a_pair_within_its_own_width_ties_whichever_way_round_it_is_named() -> None:
    # ad, bd and bc are within the widths: only ab + and ac + are left.
    widths = {("d", "a"): 31.0, ("b", "d"): 21.0, ("b", "c"): 20.0}
    assert tau(PAIRS, 0.02, widths) == (1.0, 2)
    assert tau(PAIRS, 0.02, {**widths, ("d", "a"): 30.9}) == (pytest.approx(2 / 3), 3)  # simulated: 10 apart, a tie
    assert tau(PAIRS, 1.0, {}) == (None, 0)


def test_regret_is_what_the_simulations_choice_costs_in_the_real_panel() -> None:
    assert regret(PAIRS) == pytest.approx(0.31)  # it chooses d; a is best
    assert regret({"a": (100.0, 1.0), "b": (110.0, 2.0)}) == 0.0


def ladder(*points: tuple[float, float, float]) -> list[tuple[float, dict[str, float | None]]]:
    return [(rate, {"p99_ttft": ttft, "p99_tpot": tpot}) for rate, ttft, tpot in points]


def test_capacity_under_an_slo_is_where_the_first_objective_is_crossed() -> None:
    # TTFT passes 2000 ms a third of the way from 8 to 14, TPOT 50 ms half of it.
    assert slo_capacity(ladder((4, 300, 20), (8, 1000, 40), (14, 4000, 60))) == pytest.approx(10.0)
    assert slo_capacity(ladder((4, 300, 20), (8, 1000, 40), (14, 1500, 60))) == pytest.approx(11.0)


def test_capacity_under_an_slo_may_lie_outside_of_what_was_measured() -> None:
    assert slo_capacity(ladder((4, 300, 20), (8, 2000, 50))) == float("inf")
    assert slo_capacity(ladder((4, 300, 51), (8, 400, 20))) is None
    assert slo_capacity([(4.0, {"p99_ttft": 300.0, "p99_tpot": None})]) is None


def full_run(folder: Path, ends_s: list[float], waiting: list[int], running: int) -> float:
    """Capacity of a run whose requests end so; step i, planned in second i, has waiting[i]."""
    requests = [
        {"request_id": i, "status": "length", "finish_ns": int(1e9 * end), "output_tokens": 1}
        for i, end in enumerate(ends_s)
    ]
    steps = [
        {"step": i, "plan_ns": 1_000_000_000 * i, "end_ns": 1_000_000_000 * (i + 1), "num_running": running}
        | {"num_waiting": count, "num_decodes": running}
        for i, count in enumerate(waiting)
    ]
    return saturated(write_run(folder, requests, steps))


def test_sustained_capacity_is_that_of_a_full_replica(tmp_path: Path) -> None:
    # 10 run at once. 1 ends a second for 10 s, then 4 for 15 s; then nobody waits, and the rest ends slowly.
    ends = [i + 1.0 for i in range(10)] + [10.0 + 0.25 * i for i in range(1, 61)] + [30.0 + 5 * i for i in range(10)]
    waiting = [5] * 26 + [0] * 60
    assert full_run(tmp_path / "run", ends, waiting, 10) == pytest.approx(4.0)


def test_no_more_than_half_of_the_ends_are_left_out_of_capacity(tmp_path: Path) -> None:
    # 100 run at once, and 80 end: 40 in 10 s, and 40 more in 20.
    ends = [0.25 * (i + 1) for i in range(40)] + [10.0 + 0.5 * (i + 1) for i in range(40)]
    assert full_run(tmp_path / "run", ends, [5] * 40, 100) == pytest.approx(2.0)


def test_of_a_run_in_which_hardly_anybody_waited_all_ends_tell_its_capacity(tmp_path: Path) -> None:
    ends = [0.5 * (i + 1) for i in range(60)]
    assert full_run(tmp_path / "run", ends, [1, 1, *[0] * 40], 4) == pytest.approx(2.0)


@pytest.mark.parametrize("cell", [Cell("chat", None, "mixed"), Cell("starved", 0.85, "swap", 2), Cell("a", 1.1, "b")])
def test_a_cell_is_known_by_its_name(cell: Cell) -> None:
    assert Cell.parse(cell.name) == cell


@pytest.mark.parametrize("name", ["chat", "chat~much~mixed~0", "chat~0.5~mixed~x", "chat~0.5~mixed~0~1"])
def test_what_is_no_cells_name_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(SpecError, match=rf"^{name} is no cell's name: .*WORK~LOAD~POLICY~REPEAT$"):
        Cell.parse(name)


def test_what_misses_its_target_is_counted_unless_repeats_differ_as_much() -> None:
    within = {"identical": True}
    exact = {"mean_ttft": [100.0, 104.0], "p99_ttft": [100.0, None], "output_throughput": [100.0, 99.5]}
    rest = {key: [10.0, 10.0] for key in ("mean_tpot", "p99_tpot", "mean_e2el", "p99_e2el")}
    cell = {"decisions": within, "floor": None, "figures": {**exact, **rest}}
    off = {**cell, "figures": {**cell["figures"], "mean_ttft": [100.0, 90.0], "mean_tpot": [100.0, 102.0]}}
    noisy = {**off, "floor": {"mean_ttft": 0.1, "mean_tpot": 0.019}}
    other = {**cell, "decisions": {"identical": False}}

    def count(*cells: dict[str, object], failed: int = 0) -> int:
        return missed({"cells": dict(enumerate(cells)), "failed": dict.fromkeys(range(failed), "why")})

    assert [count(cell), count(off), count(noisy), count(other), count(cell, failed=2)] == [0, 2, 1, 1, 2]
    assert count(cell, off, noisy, other, failed=1) == 5


def test_policies_without_a_request_in_common_tie_and_figures_that_nobody_has_are_left_out() -> None:
    figures = {name: [1.0 + i, 1.0 + i] for i, name in enumerate(("mean_ttft", "p99_ttft", "mean_e2el"))}
    cells = {
        policy: {"work": "chat", "load": 0.85, "repeat": 0, "policy": policy, "floor": None,
                 "figures": {"p99_tpot": [None] * 2, **{k: [ten * v for v in pair] for k, pair in figures.items()}}}
        for policy, ten in (("a", 1), ("b", 10), ("c", 100))
    }  # fmt: skip
    noise = {"chat~0.85~mean_ttft": [("a", "b", None), ("a", "c", 1.0), ("b", "c", None)]}
    rankings = decided({"cells": cells, "capacities": {"chat": 1.0}, "noise": noise})["rankings"]
    assert {(one["figure"], one["pairs"]) for one in rankings} == {("mean_ttft", 1), ("p99_ttft", 3), ("mean_e2el", 3)}
