"""Two runs side by side: errors, distances, and the first decision that differs."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import ks_2samp

from experiments.compare import Pair, compare, format_figure, ks_distance
from experiments.divergence import diff_decisions
from experiments.metrics import per_request, summarize
from experiments.records import Run, RunError, RunWriter, read_run
from experiments.render import comparison_table
from tests.experiments.fake_run import FakeRequest, constant, drive, fake_info, fake_run, random_requests
from tests.experiments.rows import write_run

AT_ONCE = [replace(request, arrival_ns=0) for request in random_requests(40, seed=9)]


def rendered(a: Run, b: Run) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(comparison_table(compare(a, b)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def unwrapped(text: str) -> str:
    return " ".join(text.split())


def test_a_run_compared_with_itself_has_no_error(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", random_requests(60, seed=1, cancelled=0.1))
    comparison = compare(run, run)
    assert comparison.matched == summarize(run)["completed"]
    assert (comparison.only_a, comparison.only_b) == (0, 0)
    assert all(pair.error == 0 for pairs in comparison.latencies.values() for pair in pairs.values())
    assert all(pair.error == 0 for pair in comparison.throughputs.values())
    assert all(spread.ks == 0 for spread in comparison.spreads.values())
    assert comparison.decisions_compared
    assert comparison.divergence is None


def test_steps_a_tenth_longer_are_errors_of_a_tenth(tmp_path: Path) -> None:
    a = fake_run(tmp_path / "a", AT_ONCE, kind="real")
    b = fake_run(tmp_path / "b", AT_ONCE, step_ns=lambda step: constant(step) * 11 // 10)
    comparison = compare(a, b)
    for pairs in comparison.latencies.values():
        for pair in pairs.values():
            assert pair.error == pytest.approx(0.1)
    for pair in comparison.throughputs.values():
        assert pair.error == pytest.approx(1 / 1.1 - 1)
    for name in ("ttft", "tpot", "e2el"):
        spread = comparison.spreads[name]
        assert [spread.mean_ape, spread.p50_ape, spread.p90_ape] == pytest.approx([0.1] * 3)
    assert comparison.divergence is None, "only the clock runs differently"


def test_figures_are_over_the_requests_that_both_completed(tmp_path: Path) -> None:
    cut = [replace(r, cancel_ns=1) if i % 4 == 0 else r for i, r in enumerate(AT_ONCE)]
    a, b = fake_run(tmp_path / "a", AT_ONCE), fake_run(tmp_path / "b", cut[:30])
    comparison = compare(a, b)
    kept = [i for i in range(30) if i % 4]
    assert (comparison.matched, comparison.only_a, comparison.only_b) == (len(kept), 40 - len(kept), 0)
    ttft = per_request(a).set_index("request_id").loc[kept, "ttft_ms"]
    assert comparison.latencies["ttft"]["p90"].a == pytest.approx(np.percentile(ttft, 90))
    assert f"{40 - len(kept)} only in a" in unwrapped(rendered(a, b))


def test_two_completed_requests_of_one_id_cannot_be_matched(tmp_path: Path) -> None:
    request = {"request_id": 3, "status": "stop", "finish_ns": 1}
    run = write_run(tmp_path / "run", [request, request], [])
    with pytest.raises(RunError, match="same request_id"):
        compare(run, run)


def test_runs_that_completed_nothing_compare_without_figures(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [], [])
    comparison = compare(run, run)
    assert comparison.latencies["ttft"]["p50"] == Pair(None, None)
    assert [row.error for row in comparison.rows()] == ["–"] * 12
    json.loads(comparison.to_json())


def test_the_table_shows_both_runs_and_the_signed_error(tmp_path: Path) -> None:
    a = fake_run(tmp_path / "on the gpu", AT_ONCE, kind="real")
    b = fake_run(tmp_path / "model", AT_ONCE, step_ns=lambda step: constant(step) * 9 // 10)
    comparison = compare(a, b)
    text = rendered(a, b)
    lines = {tuple(line.replace("│", " ").split()) for line in text.splitlines()}
    for row in comparison.rows():
        assert (*row.metric.split(), row.unit, row.a, row.b, row.error) in lines
    assert "-10.0%" in text
    assert "+11.1%" in text
    assert "real" in text
    assert "simulated" in text
    assert "the decisions are the same in every step" in unwrapped(text)


def test_clairvoyant_and_incomplete_runs_are_labelled(tmp_path: Path) -> None:
    a = fake_run(tmp_path / "a", AT_ONCE)
    with RunWriter(tmp_path / "b", {**fake_info(), "clairvoyant": True}) as writer:
        drive(writer, dict(enumerate(AT_ONCE)))
    (tmp_path / "b" / "parts").mkdir()
    text = unwrapped(rendered(a, read_run(tmp_path / "b")))
    assert "b (sim, clairvoyant, incomplete)" in text
    assert "true output lengths): b" in text


def test_json_has_everything_that_the_comparison_found(tmp_path: Path) -> None:
    a = fake_run(tmp_path / "a", AT_ONCE)
    b = fake_run(tmp_path / "b", AT_ONCE[:-1])
    comparison = compare(a, b)
    found = json.loads(comparison.to_json())
    assert found["latencies_ms"]["ttft"]["p50"]["a"] == comparison.latencies["ttft"]["p50"].a
    assert found["a"] == json.loads(json.dumps(summarize(a)))
    assert comparison.divergence is not None
    assert found["divergence"]["step"] == comparison.divergence.step


@given(st.lists(st.integers(0, 20), min_size=1, max_size=60), st.lists(st.integers(0, 20), min_size=1, max_size=60))
def test_the_distance_of_distributions_is_that_of_scipy(a: list[int], b: list[int]) -> None:
    expected = ks_2samp(a, b, method="asymp").statistic
    assert ks_distance(np.array(a, float), np.array(b, float)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.01234"),
        (1.5, "1.500"),
        (123.456, "123.5"),
        (12345.6, "12,346"),
        (None, "–"),
        (np.inf, "∞"),
    ],
)
def test_figures_have_four_digits(value: float | None, text: str) -> None:
    assert format_figure(value) == text


# Divergence


def edited(run: Run, folder: Path, edit: Callable[[list[dict[str, Any]]], None]) -> Run:
    """A copy of a run with other decisions."""
    rows = run.table("decisions").to_pylist()
    edit(rows)
    folder.mkdir()
    for path in run.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    schema = run.table("decisions").schema
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "decisions.parquet")
    return read_run(folder)


def _change(column: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    def edit(rows: list[dict[str, Any]]) -> None:
        next(r for r in rows if r["step"] == 20)[column] = value

    return edit


def _swap(rows: list[dict[str, Any]]) -> None:
    places = [i for i, r in enumerate(rows) if r["step"] == 20][:2]
    rows[places[0]], rows[places[1]] = rows[places[1]], rows[places[0]]


def _add(rows: list[dict[str, Any]]) -> None:
    last = max(i for i, r in enumerate(rows) if r["step"] == 20)
    rows.insert(last + 1, {**rows[last], "kind": "blocked", "reason": "slots"})


def _drop(rows: list[dict[str, Any]]) -> None:
    rows[:] = [r for r in rows if r["step"] != 20]


@pytest.mark.parametrize(
    "edit",
    [
        _change("kind", "swap"),
        _change("request_id", 999),
        _change("tokens", 77),
        _change("reason", "whim"),
        _swap,
        _add,
        _drop,
    ],
    ids=["kind", "request", "tokens", "reason", "order", "one more", "none"],
)
def test_any_difference_of_one_step_is_found(tmp_path: Path, edit: Callable[[list[dict[str, Any]]], None]) -> None:
    requests = random_requests(60, seed=1)
    a = fake_run(tmp_path / "a", requests)
    assert (a.decisions["step"] == 20).sum() >= 2
    b = edited(a, tmp_path / "b", edit)
    for divergence in (diff_decisions(a, b), diff_decisions(b, a)):
        assert divergence is not None
        assert (divergence.step, divergence.replica, divergence.num_steps) == (20, 0, 1)
        assert divergence.num_compared == a.decisions["step"].nunique()
        assert divergence.decisions_a != divergence.decisions_b
        assert divergence.plan_ns == a.steps["plan_ns"][20]
        assert "step 20" in str(divergence)


def test_all_steps_that_differ_are_counted_and_the_earliest_is_named(tmp_path: Path) -> None:
    def on_two_replicas(folder: Path, late: int) -> Run:
        with RunWriter(folder, fake_info()) as writer:
            drive(writer, {0: FakeRequest(late, 5, 4, 4)}, replica=0)
            drive(writer, {1: FakeRequest(0, 5, 4, 4)}, replica=1)
        return read_run(folder)

    a, b = on_two_replicas(tmp_path / "a", 10**9), on_two_replicas(tmp_path / "b", 10**9)
    assert diff_decisions(a, b) is None

    def edit(rows: list[dict[str, Any]]) -> None:
        for r in rows:
            if (r["replica"], r["step"]) in [(0, 1), (1, 2), (1, 3)]:
                r["tokens"] += 1

    divergence = diff_decisions(a, edited(b, tmp_path / "c", edit))
    assert divergence is not None
    # Step 1 of replica 0 has the smaller number, but comes a second later.
    assert (divergence.replica, divergence.step, divergence.num_steps) == (1, 2, 3)


def test_decisions_that_were_not_recorded_are_not_called_the_same(tmp_path: Path) -> None:
    a = fake_run(tmp_path / "a", AT_ONCE)
    with RunWriter(tmp_path / "b", fake_info(), decisions=False) as writer:
        drive(writer, dict(enumerate(AT_ONCE)))
    b = read_run(tmp_path / "b")
    comparison = compare(a, b)
    assert not comparison.decisions_compared
    assert comparison.decisions_line() == "decisions were not recorded in both runs"
    with pytest.raises(RunError, match="without decisions"):
        diff_decisions(a, b)


def test_a_simulation_of_something_else_than_what_was_served_is_said_to_be_one(tmp_path: Path) -> None:
    def noted(served: str, cost: dict[str, Any]) -> bool:
        runs = [fake_run(tmp_path / "real", kind="real"), fake_run(tmp_path / "sim")]
        for run, more in zip(runs, ({"model": served}, {"cost": cost}), strict=True):
            (run.folder / "run.json").write_text(json.dumps({**run.info, **more}))
        real, sim = (read_run(run.folder) for run in runs)
        notes = [note for note in compare(real, sim).notes() if "diptych profile" in note]
        assert notes == [note for note in compare(sim, real).notes() if "diptych profile" in note]
        assert not any("diptych profile" in note for note in compare(real, real).notes())
        assert all(note.startswith(f"what ran: real served {served}, sim simulates big") for note in notes)
        for run in runs:
            shutil.rmtree(run.folder)
        return bool(notes)

    sheet = {"kind": "roofline", "model": {"name": "big"}, "device": {"name": "l4"}}
    assert noted("small", sheet)
    assert noted("big", sheet)
    assert noted("small", {"kind": "fitted", "provenance": {"model": "big"}})
    assert not noted("big", {"kind": "fitted", "provenance": {"model": "big"}})
    assert not noted("big", {"kind": "fitted", "provenance": {}})
    assert not noted("big", {"kind": "constant", "step_ns": 1})
