"""Run records: written as the run goes, read back whole or in part, the same bytes for the same rows."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.metrics import summarize
from experiments.records import TABLES, RunError, RunWriter, describe_environment, read_run
from experiments.records import writer as writer_module
from tests.experiments.fake_run import drive, fake_info, fake_run, random_requests
from tests.experiments.rows import row

REPO = Path(__file__).resolve().parents[2]


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Listed:
    """A recorder that keeps the rows."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[object, ...]]] = {table: [] for table in TABLES}

    def request(self, row: tuple[object, ...]) -> None:
        self.rows["requests"].append(tuple(list(v) if isinstance(v, list) else v for v in row))

    def step(self, row: tuple[object, ...]) -> None:
        self.rows["steps"].append(row)

    def decision(self, row: tuple[object, ...]) -> None:
        self.rows["decisions"].append(row)


def feed(writer: RunWriter, rows: dict[str, list[tuple[object, ...]]]) -> None:
    for request in rows["requests"]:
        writer.request(request)
    for step in rows["steps"]:
        writer.step(step)
    for decision in rows["decisions"]:
        writer.decision(decision)


def test_rows_come_back_as_they_were_recorded(tmp_path: Path) -> None:
    listed = Listed()
    drive(listed, dict(enumerate(random_requests(30, seed=3, cancelled=0.2))))
    with RunWriter(tmp_path / "run", fake_info()) as writer:
        feed(writer, listed.rows)
    run = read_run(tmp_path / "run")
    assert run.complete
    for table, rows in listed.rows.items():
        assert rows
        assert [tuple(r.values()) for r in run.table(table).to_pylist()] == rows
    assert list(run.requests["request_id"]) == [r[0] for r in listed.rows["requests"]]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "decisions.parquet",
        "requests.parquet",
        "run.json",
        "steps.parquet",
    ]


def test_the_files_depend_on_the_rows_alone_and_not_on_when_they_were_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "ROW_GROUP", {"requests": 16, "steps": 100, "decisions": 64})
    requests = dict(enumerate(random_requests(80, seed=5)))
    with RunWriter(tmp_path / "at once", fake_info(), flush_seconds=None) as writer:
        drive(writer, requests)
    monkeypatch.setattr(writer_module, "PART_ROWS", {"requests": 3, "steps": 7, "decisions": 5})
    with RunWriter(tmp_path / "by count", fake_info(), flush_seconds=None) as writer:
        drive(writer, requests)
    with RunWriter(tmp_path / "by age too", fake_info(), flush_seconds=0.001) as writer:
        drive(writer, requests)
    expected = file_bytes(tmp_path / "at once")
    assert file_bytes(tmp_path / "by count") == expected
    assert file_bytes(tmp_path / "by age too") == expected
    groups = pq.ParquetFile(tmp_path / "by count" / "steps.parquet").metadata
    sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
    assert sizes[:-1] == [100] * (len(sizes) - 1)
    assert len(sizes) > 1


def test_rows_go_to_disk_by_age_while_nothing_else_happens(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", fake_info(), flush_seconds=0.01)
    writer.step(row("steps", step=0))
    for _ in range(1000):
        if len(read_run(tmp_path / "run").steps):
            break
        time.sleep(0.01)
    run = read_run(tmp_path / "run")
    assert list(run.steps["step"]) == [0]
    assert not run.complete
    writer.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from experiments.records import RunWriter, writer
from tests.experiments.fake_run import drive, fake_info, random_requests
writer.PART_ROWS.update(requests=4, steps=10, decisions=1000)
run = RunWriter(Path(sys.argv[1]), fake_info(), flush_seconds=None)
class Dying:
    request, decision, steps = run.request, run.decision, 0
    def step(self, row):
        run.step(row)
        self.steps += 1
        if self.steps == 95:
            os.kill(os.getpid(), signal.SIGKILL)
drive(Dying(), dict(enumerate(random_requests(60, seed=1))))
"""


def test_a_killed_run_keeps_what_it_had(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run")], cwd=REPO, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    whole = fake_run(tmp_path / "whole")
    run = read_run(tmp_path / "run")
    assert not run.complete
    assert len(run.steps) == 90
    assert run.steps.equals(whole.steps.head(90))
    found, known = run.table("requests"), whole.table("requests")
    assert 0 < len(found) < len(known)
    assert found.equals(known.slice(0, len(found)))
    # Every step that these requests need is there too, so that their metrics can be computed.
    assert summarize(run)["completed"] == len(found)


def test_rows_whose_write_fails_go_to_disk_with_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter(tmp_path / "run", fake_info(), flush_seconds=None)
    for step in range(5):
        writer.step(row("steps", step=step))
    with monkeypatch.context() as full:

        def no_room(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        full.setattr(writer_module, "_write", no_room)
        with pytest.raises(RunError, match="No space left"):
            writer.flush()
    writer.step(row("steps", step=5))
    writer.abort()
    assert list(read_run(tmp_path / "run").steps["step"]) == [0, 1, 2, 3, 4, 5]


def test_a_value_that_no_column_can_hold_is_said_also_where_rows_go_to_disk_by_age(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", fake_info(), flush_seconds=0.001)
    writer.step(row("steps", step=0, wake_ns=2**63))
    assert writer._flusher is not None
    writer._flusher.join(60)
    with pytest.raises(RunError, match="wake_ns is no int64"):
        writer.close()


def test_a_run_left_by_an_exception_stays_readable_and_incomplete(tmp_path: Path) -> None:
    def interrupted() -> None:
        with RunWriter(tmp_path / "run", fake_info()) as writer:
            drive(writer, dict(enumerate(random_requests(20, seed=2))), max_steps=30)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    run = read_run(tmp_path / "run")
    assert not run.complete
    assert "incomplete" in run.label
    assert len(run.steps) >= 29
    assert (run.requests["status"] == "unfinished").any()


def test_a_folder_that_holds_a_run_is_refused_unless_it_may_be_overwritten(tmp_path: Path) -> None:
    first = fake_run(tmp_path / "run")
    with pytest.raises(RunError, match="holds a run already"):
        RunWriter(tmp_path / "run", fake_info())
    assert read_run(tmp_path / "run").steps.equals(first.steps)
    with RunWriter(tmp_path / "run", fake_info(), overwrite=True, decisions=False) as writer:
        writer.step(row("steps", step=0))
    run = read_run(tmp_path / "run")
    assert len(run.steps) == 1
    assert not (tmp_path / "run" / "decisions.parquet").exists()


def test_a_run_without_decisions_says_so(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run", fake_info(), decisions=False) as writer:
        drive(writer, dict(enumerate(random_requests(5, seed=1))))
    run = read_run(tmp_path / "run")
    assert len(run.requests) == 5
    assert not run.has_decisions
    with pytest.raises(RunError, match="recorded without decisions"):
        _ = run.decisions


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1, 2), "2 values"),
        (row("steps", step="one"), r"steps\.step is no int64"),
        (row("steps", step=None), r"steps\.step is missing"),
        (row("steps", num_running=2**31), r"steps\.num_running is no int32"),
    ],
)
def test_a_row_that_does_not_fit_the_columns_is_refused(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(RunError, match=message), RunWriter(tmp_path / "run", fake_info(), flush_seconds=None) as writer:
        writer.step(values)


def test_single_columns_and_the_number_of_rows_are_read_without_the_rest(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "cut", fake_info())
    drive(writer, dict(enumerate(random_requests(10, seed=2))), max_steps=20)
    writer.abort()
    fake_run(tmp_path / "whole")
    for folder in (tmp_path / "cut", tmp_path / "whole"):
        run, names = read_run(folder), ["end_ns", "replica"]
        assert run.columns("steps", names).equals(read_run(folder).table("steps").select(names))
        assert run.num_rows("steps") == len(run.steps) > 0
        assert run.columns("steps", names).equals(run.table("steps").select(names))  # now that it is read whole


def test_rows_after_the_end_are_refused_and_closing_twice_is_not(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", fake_info())
    writer.close()
    writer.close()
    with pytest.raises(RunError, match="is closed"):
        writer.step(row("steps"))


def test_times_keep_every_nanosecond_even_where_some_are_missing(tmp_path: Path) -> None:
    late = 2**53 + 1
    with RunWriter(tmp_path / "run", fake_info(), flush_seconds=None) as writer:
        writer.request(row("requests", request_id=0, finish_ns=late))
        writer.request(row("requests", request_id=1, finish_ns=None))
    finish = read_run(tmp_path / "run").requests["finish_ns"]
    assert finish[0] == late
    assert finish.isna().tolist() == [False, True]


def _remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _write(name: str, content: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content)


def _columns(folder: Path) -> None:
    pq.write_table(pa.table({"step": [1]}), folder / "steps.parquet")


def _types(folder: Path) -> None:
    table = pq.read_table(folder / "steps.parquet")
    column = table["step"].cast(pa.int32())
    pq.write_table(table.set_column(table.column_names.index("step"), "step", column), folder / "steps.parquet")


def _cut(folder: Path) -> None:
    content = (folder / "steps.parquet").read_bytes()
    (folder / "steps.parquet").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("run.json"), "holds no run"),
        (_write("run.json", b"{"), "run.json cannot be read"),
        (_write("run.json", b"\xff"), "run.json cannot be read"),
        (_write("run.json", b"[]"), "no run's description"),
        (_write("run.json", b'{"kind": "sim", "tables": ["x"]}'), "tables must be some of"),
        (_remove("steps.parquet"), "steps.parquet is missing"),
        (_write("steps.parquet", b"nonsense"), "steps.parquet is broken"),
        (_cut, "steps.parquet is broken"),
        (_columns, "lacks the column replica"),
        (_types, "column step is int32, not int64"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    fake_run(tmp_path / "run", random_requests(3, seed=1))
    damage(tmp_path / "run")
    with pytest.raises(RunError, match=message) as caught:
        _ = read_run(tmp_path / "run").steps
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no folder .*nowhere"):
        read_run(tmp_path / "nowhere")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        RunWriter(tmp_path / "file" / "run", fake_info())


def test_a_description_that_is_no_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for bad in ({"x": object()}, {"x": float("nan")}):
        with pytest.raises(RunError, match="JSON values only"):
            RunWriter(tmp_path / "run", {**fake_info(), **bad})
    with pytest.raises(RunError, match="kind"):
        RunWriter(tmp_path / "run", {})
    assert not (tmp_path / "run").exists()


def test_a_simulated_run_is_described_without_date_and_host_and_a_real_one_with_them() -> None:
    simulated = describe_environment("sim")
    assert simulated == describe_environment("sim")
    assert "started_at" not in simulated
    assert simulated["hardware"] == {}
    assert "torch" not in simulated["software"]
    real = describe_environment("real")
    assert real["started_at"]
    assert real["hardware"]["cpu"]
    assert real["hardware"]["cores"] >= 1
    assert real["software"]["torch"]
    json.dumps(real)
    with pytest.raises(ValueError, match="kind"):
        describe_environment("dream")
