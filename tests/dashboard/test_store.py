"""The dashboard reads the runs under one folder and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from dashboard.store import Entry, fingerprint, list_runs, open_run
from experiments.records import RunError
from tests.experiments.fake_run import fake_run, random_requests

REQUESTS = random_requests(3, seed=1)


def test_runs_are_found_in_folders_of_folders(tmp_path: Path) -> None:
    fake_run(tmp_path / "b", REQUESTS)
    fake_run(tmp_path / "sweep" / "rate" / "a", REQUESTS, kind="real")
    (tmp_path / "no run").mkdir()
    assert list_runs(tmp_path) == [Entry("b", "sim"), Entry("sweep/rate/a", "real")]


def test_a_run_that_cannot_be_read_is_listed_with_the_reason(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", REQUESTS)
    (tmp_path / "a" / "run.json").write_text("{")
    (entry,) = list_runs(tmp_path)
    assert entry.label == "a (unreadable)"
    assert "cannot be read" in entry.error


@pytest.mark.parametrize("name", ["../outside", "inside/../../outside"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    fake_run(tmp_path / "outside", REQUESTS)
    fake_run(tmp_path / "root" / "inside", REQUESTS)
    with pytest.raises(RunError, match="leads out"):
        open_run(tmp_path / "root", name)
    with pytest.raises(RunError, match="leads out"):
        open_run(tmp_path / "root", str(tmp_path / "outside"))


def test_no_link_leads_out_of_the_folder(tmp_path: Path) -> None:
    fake_run(tmp_path / "outside", REQUESTS)
    fake_run(tmp_path / "root" / "inside", REQUESTS)
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    steps = tmp_path / "root" / "inside" / "steps.parquet"
    steps.unlink()
    steps.symlink_to(tmp_path / "outside" / "steps.parquet")
    assert [entry.name for entry in list_runs(tmp_path / "root")] == ["inside"]
    for name in ("link", "inside"):
        with pytest.raises(RunError, match="leads out"):
            open_run(tmp_path / "root", name)


def test_the_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", REQUESTS)
    before = fingerprint(tmp_path, "a")
    assert before == fingerprint(tmp_path, "a")
    (tmp_path / "a" / "steps.parquet").write_bytes(b"other")
    assert fingerprint(tmp_path, "a") != before
