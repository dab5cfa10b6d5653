"""`diptych validate` from beginning to end on the CPU, and how it fails."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from experiments.fidelity import validation
from experiments.fidelity.matrix import Cell
from experiments.spec import SpecError
from tests.experiments.command import diptych

CELLS = (Cell("chat", None, "mixed"), Cell("chat", 0.85, "sjf"))
QUICK = ["validate", "--quick", "--cell-seconds", "0.1", "--profile-seconds", "1", "--processes", "1"]
Validate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def validate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Validate:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validation, "QUICK_CELLS", CELLS)
    return lambda *args: diptych(monkeypatch, capsys, *args)


def tables(text: str) -> str:
    """What a command printed, from its first table's heading on."""
    return text[text.index("Loads are shares") : text.index("#### 4.")]


def test_a_validation_that_was_stopped_goes_on_and_is_evaluated_again_from_what_it_left(
    validate: Validate, tmp_path: Path
) -> None:
    # No time for a run is left after the device was profiled.
    status, out, err = validate(*QUICK, "--time-limit", "1", "--out", "v")
    assert status == 2
    assert "no time left for chat~capacity~mixed~0" in out + err
    assert "v holds no runs; make some with diptych validate" in err.strip().splitlines()[-1]
    calibration = (tmp_path / "v" / "calibrations" / "cpu.json").read_bytes()

    status, out, _ = validate(*QUICK, "--out", "v", "--archive", "v.tar")
    assert status == 0
    assert "profiled" not in out
    assert "2 of 2 runs decided alike" in out
    found = json.loads((tmp_path / "v" / "fidelity.json").read_text())
    assert sorted(found["cells"]) == sorted(cell.name for cell in CELLS)
    assert not found["failed"]
    for cell in found["cells"].values():
        assert cell["decisions"]["identical"]
        assert cell["completed"] == cell["requests"] == (28 if cell["load"] is None else 20)
        assert all(real > 0 and simulated > 0 for real, simulated in cell["figures"].values())
    assert (tmp_path / "v" / "calibrations" / "cpu.json").read_bytes() == calibration
    assert not list((tmp_path / "v" / "scratch").iterdir())

    records = {path: path.read_bytes() for path in (tmp_path / "v" / "runs").rglob("*") if path.is_file()}
    status, again, _ = validate(*QUICK, "--out", "v")
    assert (status, tables(again)) == (0, tables(out))
    assert json.loads((tmp_path / "v" / "fidelity.json").read_text()) == found
    assert {path: path.read_bytes() for path in (tmp_path / "v" / "runs").rglob("*") if path.is_file()} == records

    status, text, _ = validate("validate", "--from", "v.tar", "--processes", "1")
    assert (status, tables(text)) == (0, tables(out))
    (tmp_path / "v" / "failed.json").write_text('{"chat~0.95~mixed~0": "made up"}')
    status, text, err = validate("validate", "--from", "v", "--processes", "1", "--strict")
    assert (status, tables(text)) == (1, tables(out))
    assert re.search(r"[1-9]\d* figures miss their targets", err)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--quick", "--trace", "chat=a.csv"], "--trace: the quick matrix has no traces; leave --quick or --trace out"),
        (["--trace", "chat=nothing"], "--trace chat=nothing: write WORKLOAD=FILE"),
        (["--trace", "chatter=a.csv"], "there is no workload 'chatter' in the matrix; it has chat, code"),
        (["--from", "empty"], "empty holds no runs; make some with diptych validate"),
        (["--from", "missing"], "missing holds no runs; make some with diptych validate"),
        (["--from", "a.csv"], "a.csv cannot be unpacked: "),
    ],
)
def test_a_mistake_ends_a_validation_with_one_line(
    args: list[str], words: str, validate: Validate, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("no archive")
    status, out, err = validate("validate", *args)
    assert (status, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert words in err


def test_a_folder_of_another_matrix_is_refused(validate: Validate, tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "matrix.json").write_text("{}\n")
    status, _, err = validate(*QUICK, "--out", "v")
    assert status == 2
    assert "v has runs of another model or of other workloads; name another folder" in err
    assert (tmp_path / "v" / "matrix.json").read_text() == "{}\n"


def test_a_matrix_that_was_written_before_a_field_was_there_is_the_same_one(tmp_path: Path) -> None:
    base, works, _ = validation.quick()
    matrix = {"base": base.model_dump(mode="json"), "works": {name: asdict(work) for name, work in works.items()}}
    validation._same_matrix(tmp_path, matrix)
    written = json.loads((tmp_path / "matrix.json").read_text())
    earlier = copy.deepcopy(written)
    del (
        earlier["base"]["limits"]["plan_lead_ms"],
        earlier["base"]["price_per_hour"],
        earlier["works"]["chat"]["policies"],
    )
    (tmp_path / "matrix.json").write_text(json.dumps(earlier))
    validation._same_matrix(tmp_path, matrix)
    assert json.loads((tmp_path / "matrix.json").read_text()) == written
    for group, field, value in (("base", "seed", 1), ("works", "chat", {"workload": {"name": "chat", "cv": 2.0}})):
        (tmp_path / "matrix.json").write_text(json.dumps({**earlier, group: {**earlier[group], field: value}}))
        with pytest.raises(SpecError, match="has runs of another model or of other workloads"):
            validation._same_matrix(tmp_path, matrix)
