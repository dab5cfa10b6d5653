"""A sweep in its folder: what is there is kept, what is missing is run, and the table is written when all have ended.

sweep.json          what was asked for, with the base in it, and versions
cells/<name>/       one run folder a cell, with cell.json: specification, digest, versions, figures, or what failed
results.parquet     one row a cell, every figure (results.csv: the same)
summary.md          what was run and how it was measured; the cells, means over seeds, comparisons
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.records import describe_environment
from experiments.spec import SpecError
from experiments.sweeps.cell_run import NOTE, Job, remeasure, write_json
from experiments.sweeps.cells import Cell, Sweep
from experiments.sweeps.identity import code_key, digest
from experiments.sweeps.spec import Measure

Runner = Callable[[Sequence[Job], Path], Iterable[tuple[Job, dict[str, Any]]]]
"""Runs jobs of one panel into a folder of cells; gives each with its note as it ends."""
Say = Callable[[Cell, dict[str, Any]], None]


@dataclass(frozen=True)
class State:
    """Which cells of a sweep have ended well already, by what code; the others are to be run."""

    finished: dict[str, dict[str, Any]]
    outdated: list[str]

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those to be run."""
        return [cell for cell in cells if cell.name not in self.finished]


def state_of(cells: Sequence[Cell], folder: Path, keep_outdated: bool = False) -> State:
    """What a folder holds of these cells: name -> note of those that have ended well.

    A cell that other code has run is outdated, and is run again unless they are kept.
    """
    finished, outdated = {}, []
    for cell in cells:
        note = _note(folder / "cells" / cell.name / NOTE)
        if note is None or note.get("key") != cell.key or note.get("status") != "ok":
            continue
        if note.get("code") != code_key(cell.panel, cell.spec):
            outdated.append(cell.name)
            if not keep_outdated:
                continue
        finished[cell.name] = note
    return State(finished, outdated)


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    measure: Measure,
    *,
    runner: Runner,
    keep_outdated: bool = False,
    say: Say = lambda cell, note: None,
) -> dict[str, dict[str, Any]]:
    """Run what a folder lacks of these cells. Returns name -> note of all of them, in their order.

    `say` is told of each cell that ends, the ones that were there already first. Raises SpecError where another sweep
    is running in the folder.
    """
    places = folder / "cells"
    places.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        _sweep_out(places)
        state = state_of(cells, folder, keep_outdated)
        notes = {}
        for name, note in state.finished.items():
            same = note["measure"] == measure.model_dump(mode="json")
            notes[name] = note if same else remeasure(places / name, measure)
        by_name = {cell.name: cell for cell in cells}
        for name, note in notes.items():
            say(by_name[name], note)
        for panel in ("real", "sim"):  # in this order: a simulation may take its limits from a real run
            missing = [cell for cell in state.missing(cells) if cell.panel == panel]
            jobs = []
            for cell in missing:
                job = _job(cell, measure, places)
                if isinstance(job, Job):
                    jobs.append(job)
                else:
                    notes[cell.name] = job
                    say(cell, job)
            for job, note in runner(jobs, places) if jobs else ():
                notes[job.name] = note
                say(by_name[job.name], note)
    return {cell.name: notes[cell.name] for cell in cells}


def start(sweep: Sweep, folder: Path) -> None:
    """Make a sweep's folder, or take up one that is there. Raises SpecError where it holds something else."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "sweep.json").is_file():
        raise SpecError(f"{folder} holds other things than a sweep; name another folder (-o NAME)")
    folder.mkdir(parents=True, exist_ok=True)
    versions = {name: of for name, of in describe_environment("sim").items() if name not in ("kind", "hardware")}
    keys = {cell.name: cell.key for cell in sweep.cells}
    write_json(
        folder / "sweep.json", {"sweep": sweep.content, "hash": digest(keys), "cells": keys, "versions": versions}
    )


def _job(cell: Cell, measure: Measure, places: Path) -> Job | dict[str, Any]:
    """What a worker is given; or the note of a cell that cannot be run."""
    like = None
    if cell.like is not None:
        note = _note(places / cell.like / NOTE)
        if note is None or note.get("status") != "ok":
            return {"status": "failed", "error": f"the real run that it is to be like has failed: {cell.like}"}
        like = json.loads((places / cell.like / "run.json").read_text(encoding="utf-8"))["limits"]
    # What is given alone: a calibration's limits stand in for those that are not, and a pool's fields for the run's.
    spec = cell.spec.model_dump(mode="json", exclude_unset=True)
    code = code_key(cell.panel, cell.spec)
    return Job(cell.name, cell.values, cell.seed, cell.panel, spec, cell.key, code, measure, like)


def _note(path: Path) -> dict[str, Any] | None:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def _sweep_out(places: Path) -> None:
    """What killed workers have left behind."""
    for scratch in places.glob(".*"):
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder against another sweep, until this process ends in whatever way."""
    import fcntl

    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SpecError(f"another sweep is running in {folder}; wait for it, or name another folder") from None
        yield
