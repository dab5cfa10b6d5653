"""A trace holds every step and every request of its run."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from experiments.records import Run
from experiments.trace_export import write_trace
from tests.experiments.command import diptych
from tests.experiments.fake_run import fake_run, random_requests


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fake_run(tmp_path_factory.mktemp("trace") / "run", random_requests(40, seed=2, cancelled=0.1), lag=1)


def events_of(written: bytes) -> list[dict[str, Any]]:
    content = json.loads(gzip.decompress(written))
    return list(content["traceEvents"])


def test_steps_follow_one_another_and_none_is_missing(run: Run) -> None:
    steps = [event for event in events_of(write_trace(run)) if event["ph"] == "X"]
    ran = run.steps[(run.steps["num_decodes"] > 0) | (run.steps["num_chunks"] > 0)]
    assert [event["args"]["step"] for event in steps] == ran["step"].tolist()
    assert [round(1e3 * (event["ts"] + event["dur"])) for event in steps] == ran["end_ns"].tolist()
    for one, two in itertools.pairwise(steps):
        assert one["ts"] + one["dur"] <= two["ts"] + 1e-6


def test_every_request_begins_and_ends(run: Run) -> None:
    marks = Counter((e["name"], e["id"], e["ph"]) for e in events_of(write_trace(run)) if e.get("cat") == "request")
    assert set(marks.values()) == {1}
    for row in run.requests.itertuples():
        assert marks[f"request {row.request_id}", row.request_id, "b"] == 1
    assert all(marks[name, i, "b" if ph == "e" else "e"] == 1 for name, i, ph in marks)


def test_the_same_run_gives_the_same_bytes_and_the_command_writes_them(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "folder" / "trace.json.gz"
    status, out, _ = diptych(monkeypatch, capsys, "trace-export", str(run.folder), "-o", str(file))
    assert status == 0
    assert file.read_bytes() == write_trace(run)
    assert f"{len(run.steps):,} steps" in out
