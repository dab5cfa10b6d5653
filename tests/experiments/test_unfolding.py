"""Rows that stand for many are written as those many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.records import RunWriter, read_run
from experiments.records.schema import RunError, to_table
from experiments.records.unfolding import Repeated, StepRows, decisions_table
from experiments.records.writer import PART_ROWS
from policies.records import STEPS, DecodeSteps
from tests.experiments.fake_run import fake_info


def some(seed: int, n: int = 40) -> list[tuple[object, ...] | DecodeSteps]:
    """Rows of steps, every third of them for several."""
    draw, made = np.random.default_rng(seed), []
    for _ in range(n):
        values = draw.integers(1, 99, len(STEPS)).tolist()
        row = tuple(x > 50 if name == "graph" else x for name, x in zip(STEPS, values, strict=True))
        count = int(draw.integers(1, 6))
        times = [tuple(draw.integers(0, 1 << 50, 4).tolist()) for _ in range(count)]
        unused, longest = draw.integers(0, 99, count).tolist(), int(draw.integers(0, 99))
        first = dict(zip(STEPS, [*row[:2], *times[0], *row[6:]], strict=True))
        if draw.integers(0, 2):
            first |= {"num_chunks": 0, "chunk_tokens": 0, "chunk_context": 0}
        first |= {"free_blocks": unused[0], "max_context": max(longest, first["chunk_context"])}
        run = DecodeSteps(tuple(first.values()), times, unused, longest, 17)
        made.append(run if draw.integers(0, 3) == 0 else row)
    return made


def steps_table(rows: list[tuple[object, ...] | DecodeSteps]) -> pa.Table:
    taken = StepRows()
    for row in rows:
        (taken.add_run if isinstance(row, DecodeSteps) else taken.add)(row)  # type: ignore[arg-type]
    return taken.table()


def decisions(run: DecodeSteps) -> list[tuple[object, ...]]:
    return [row for later in range(len(run.times)) for row in run.decision_rows(later)]


@pytest.mark.parametrize("seed", range(3))
def test_a_run_of_steps_is_unfolded_to_the_rows_it_stands_for(seed: int) -> None:
    rows = some(seed)
    runs = [row for row in rows if isinstance(row, DecodeSteps)]
    one_by_one = [step for row in rows for step in (row.step_rows() if isinstance(row, DecodeSteps) else [row])]
    assert len(one_by_one) > len(rows) > len(runs) > 0
    assert steps_table(rows).equals(to_table("steps", one_by_one))
    decision = (0, 1, 2, "chunk", 3, "")
    folded = [row for run in runs for row in (Repeated(run.decision_rows(), len(run.times)), decision)]
    decided = [row for run in runs for row in (*decisions(run), decision)]
    assert decisions_table(folded).equals(to_table("decisions", decided))


def test_what_a_run_of_steps_has_of_its_own_is_in_its_rows() -> None:
    first = dict.fromkeys(STEPS, 0) | {"step": 5, "num_decodes": 3, "decode_context": 30, "max_context": 12}
    first |= {"plan_ns": 1, "launch_ns": 2, "end_ns": 3, "device_ns": 1, "decode_clock": 8, "free_blocks": 7}
    run = DecodeSteps(tuple(first.values()), [(1, 2, 3, 1), (4, 5, 6, 1)], [7, 6], 12, -1)
    second = first | {"step": 6, "decode_context": 33, "max_context": 13, "decode_clock": 9, "free_blocks": 6}
    second |= {"plan_ns": 4, "launch_ns": 5, "end_ns": 6}
    assert list(run.step_rows()) == [tuple(first.values()), tuple(second.values())]
    assert decisions(run) == [(0, 5, -1, "decode", 3, ""), (0, 6, -1, "decode", 3, "")]

    first |= {"num_chunks": 1, "chunk_tokens": 4, "chunk_pairs": 10, "chunk_context": 4, "chunk_squares": 16}
    chunked = run._replace(first=tuple(first.values()), request_id=9)
    second |= {"num_chunks": 1, "chunk_tokens": 4, "chunk_pairs": 26, "chunk_context": 8, "chunk_squares": 16}
    assert list(chunked.step_rows()) == [tuple(first.values()), tuple(second.values())]
    assert chunked.decision_rows(1) == [(0, 6, -1, "decode", 3, ""), (0, 6, 9, "chunk", 4, "")]


@pytest.mark.parametrize("packed_at", [2, 1000])
def test_a_writer_takes_runs_of_steps_among_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed_at: int
) -> None:
    monkeypatch.setattr("experiments.records.writer.PACKED_AT", packed_at)
    rows = some(7)
    with RunWriter(tmp_path, fake_info(), flush_seconds=None) as writer:
        for row in rows:
            (writer.decode_steps if isinstance(row, DecodeSteps) else writer.step)(row)  # type: ignore[arg-type]
    run = read_run(tmp_path)
    assert run.table("steps").equals(steps_table(rows))
    decided = [decision for row in rows if isinstance(row, DecodeSteps) for decision in decisions(row)]
    assert run.table("decisions").equals(to_table("decisions", decided))


def test_few_rows_that_stand_for_many_go_to_disk_as_those_many_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PART_ROWS, "steps", 50)
    runs = [row for row in some(3, 110) if isinstance(row, DecodeSteps)]
    with RunWriter(tmp_path, fake_info(), flush_seconds=None) as writer:
        for run in runs:
            writer.decode_steps(run)
        kept = sum(pq.read_metadata(path).num_rows for path in (tmp_path / "parts").glob("steps-*.parquet"))
        assert len(runs) < 50 < kept
    assert read_run(tmp_path).table("steps").equals(steps_table(runs))


def test_a_number_that_is_none_is_told_with_its_column() -> None:
    rows = StepRows()
    for wrong in ("x", None, 1 << 70):
        row = [0] * len(STEPS)
        row[6] = wrong  # type: ignore[call-overload]
        for take in (rows.add, lambda row: to_table("steps", [row])):
            with pytest.raises(RunError, match="num_decodes"):
                take(row)
    assert len(rows.table()) == 0  # nothing is left of them
    row[6] = 1 << 40
    rows.add(row)
    with pytest.raises(RunError, match="num_decodes is no int32"):
        rows.table()
    with pytest.raises(RunError, match="num_decodes is no int32"):
        to_table("steps", [row])
    with pytest.raises(RunError, match="a row of steps has 3 values"):
        rows.add((1, 2, 3))
