"""Validation of the simulator against the runtime: what it measures by, and what it keeps."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from experiments.fidelity.archive import pack, unpack
from experiments.fidelity.capacity import card
from experiments.fidelity.matrix import BUSY, LOADS, POLICIES, USUAL, Cell, arrivals_at, ordered, works
from experiments.fidelity.steps import StepError
from experiments.records.environment import card_of
from experiments.spec import SpecError
from experiments.workloads import WorkloadSpec, make_workload


def test_steps_that_took_no_time_leave_errors_that_json_can_say() -> None:
    # Two steps that the host saw the end of at once: 0.1 ms each, by convention.
    error = StepError.of(np.array([2e5, 3e5]), np.zeros(2), np.zeros(2, bool))
    json.dumps(asdict(error), allow_nan=False)
    assert (error.mean, error.bias) == (pytest.approx(2.5), pytest.approx(1.5))


@pytest.mark.parametrize("name", ["chat", "prefix", "bursts"])
def test_requests_arrive_at_exactly_the_rate_asked_for_and_are_the_same_at_every_load(name: str) -> None:
    work = works(max_model_len=4096, starved_blocks=1600)[name]
    made = []
    for rate in (7.0, 19.0):
        fields = {**work.workload, "n": 150}
        made.append(make_workload(WorkloadSpec.model_validate({**fields, **arrivals_at(rate, fields, work)})))
        assert made[-1].rate == pytest.approx(rate, rel=1e-6)
    one, other = made
    assert one.prompt_tokens.tolist() == other.prompt_tokens.tolist()
    assert one.output_tokens.tolist() == other.output_tokens.tolist()


def test_the_matrix_is_whole_and_a_few_minutes_of_it_tell_every_workload_the_noise_and_the_ranking() -> None:
    cells = list(ordered(works(max_model_len=4096, starved_blocks=1600)))
    assert len(set(cells)) == len(cells)
    assert {cell.name for cell in map(Cell.parse, [cell.name for cell in cells])} == {cell.name for cell in cells}
    for i, cell in enumerate(cells):
        assert cell.load is None or Cell(cell.work, None, "mixed") in cells[:i]
    first = cells[:23]
    # Loads on both sides of where objectives are missed come before the other workloads.
    assert [cell.load for cell in first[:5]] == [None, USUAL, 1.5, 1.25, 1.1]
    assert {cell.work for cell in first} == {"chat", "code", "prefix", "starved", "sharegpt"}
    assert {(cell.load, cell.repeat) for cell in first if cell.repeat} == {(USUAL, 1), (BUSY, 1)}
    assert {cell.policy for cell in first if cell.load == BUSY} == set(POLICIES)
    chosen = {(cell.work, cell.load, cell.policy) for cell in cells}
    assert all((work, load, policy) in chosen for work in ("chat", "bursts") for load in LOADS for policy in POLICIES)


def test_cards_are_told_apart_without_being_named() -> None:
    one, other = ({"gpus": [{"name": "NVIDIA H100 80GB HBM3", "card": card_of(uuid)}]} for uuid in ("a-1", "a-2"))
    assert card(one) != card(other)
    assert "a-1" not in card(one)
    assert (card({"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}), card({})) == ("NVIDIA-H100-", "cpu")


def test_an_archive_brings_back_the_records_and_leaves_out_what_is_unfinished(tmp_path: Path) -> None:
    kept = {"tiny/matrix.json": "{}", "tiny/runs/a/run.json": "{}", "tiny/runs/a/steps.parquet": "PAR1"}
    left = {"tiny/scratch/b/run.json": "{}", "tiny/runs/b/steps.parquet.tmp": "PAR", "tiny/failed.partial": "{"}
    for name, text in {**kept, **left}.items():
        path = tmp_path / "fidelity" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    pack(tmp_path / "fidelity", tmp_path / "fidelity.tar")
    unpack(tmp_path / "fidelity.tar", tmp_path / "elsewhere")
    root = tmp_path / "elsewhere" / "fidelity"
    assert {str(p.relative_to(root)): p.read_text() for p in root.rglob("*") if p.is_file()} == kept


def test_what_is_no_archive_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "fidelity.tar").write_text("no archive")
    with pytest.raises(SpecError, match=r"cannot be unpacked: .*; give a fidelity\.tar"):
        unpack(tmp_path / "fidelity.tar", tmp_path)
