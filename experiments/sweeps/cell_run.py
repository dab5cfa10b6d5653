"""Running one cell: in a folder of its own, which gets its name once everything in it is there."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from experiments.records import describe_environment, read_run
from experiments.simulated import run_simulated
from experiments.spec import ModelSpec, RunSpec, SpecError
from experiments.sweeps.identity import code_key
from experiments.sweeps.measuring import measured
from experiments.sweeps.spec import Measure, Panel
from experiments.workloads import Workload, WorkloadSpec, make_workload
from policies.replica_state import Limits

if TYPE_CHECKING:
    from runtime.weights import LoadedModel

NOTE = "cell.json"
"""In a cell's folder once it has ended, well or not."""


@dataclass(frozen=True)
class Job:
    """A cell to run, in any process of this machine or another one.

    Attributes:
        spec: the fields of the run that were given, as JSON values.
        like: run.json's limits of the real run that a simulation takes over.
        code: what `identity.code_key` must be where it runs: cells of one table are of one code.
    """

    name: str
    values: dict[str, Any]
    seed: int | None
    panel: Panel
    spec: dict[str, Any]
    key: str
    code: str
    measure: Measure
    like: dict[str, Any] | None = None


def perform(job: Job, folder: Path) -> dict[str, Any]:
    """Run a job into a folder, measure it, and leave `cell.json`; its content. What goes wrong is said in there."""
    started = time.perf_counter()
    note: dict[str, Any] = {
        "values": job.values,
        "seed": job.seed,
        "panel": job.panel,
        "key": job.key,
        "code": job.code,
        "spec": job.spec,
        "versions": {name: of for name, of in describe_environment("sim").items() if name not in ("kind", "hardware")},
    }
    try:
        spec = RunSpec.model_validate(job.spec)
        note["spec"] = spec.model_dump(mode="json")
        if code_key(job.panel, spec) != job.code:
            raise SpecError("this worker has another version of the code; give all of them the same one")
        _run(job, spec, folder)
        note |= {"status": "ok", "error": "", **_figures(folder, job.measure)}
    except Exception as error:
        note |= {"status": "failed", "error": one_line(error), **_measured(job.measure, {})}
    note["seconds"] = round(time.perf_counter() - started, 3)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / NOTE, note)
    return note


def remeasure(folder: Path, measure: Measure) -> dict[str, Any]:
    """The note of a run that is there already, with figures of another window or other objectives."""
    note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    note |= _figures(folder, measure)
    write_json(folder / NOTE, note)
    return dict(note)


def _figures(folder: Path, measure: Measure) -> dict[str, Any]:
    return _measured(measure, measured(read_run(folder), measure))


def _measured(measure: Measure, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {"measure": measure.model_dump(mode="json"), "figures": dict(figures)}


def _run(job: Job, spec: RunSpec, folder: Path) -> None:
    workload = _workload(spec.workload.model_dump_json())
    if job.panel == "sim":
        limits = None if job.like is None else TypeAdapter(Limits).validate_python(job.like)
        run_simulated(spec, folder, workload=workload, limits=limits, overwrite=True)
        return
    from experiments.real import check_servable, run_real  # torch is slow to import, and only needed here

    check_servable(spec)
    run_real(spec, folder, workload=workload, loaded=_loaded(spec.model), overwrite=True)


@functools.lru_cache(maxsize=1)
def _workload(spec: str) -> Workload:
    """Reading a trace can take longer than simulating it: cells that follow each other often have the same one."""
    return make_workload(WorkloadSpec.model_validate_json(spec))


_MODEL: list[tuple[ModelSpec, LoadedModel]] = []


def _loaded(spec: ModelSpec) -> LoadedModel:
    """The model, which stays loaded until a cell asks for another one."""
    from experiments.real import load

    if not _MODEL or _MODEL[0][0] != spec:
        release()
        _MODEL.append((spec, load(spec)))
    return _MODEL[0][1]


def release() -> None:
    """Close the model that is loaded."""
    while _MODEL:
        _MODEL.pop()[1].close()


def one_line(error: BaseException) -> str:
    """An error's text on one line; what is no mistake of a user's has its type before it."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """The file is there whole or not at all."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


@contextmanager
def settled(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes `folder`'s place at the end; after an error nothing is left of it."""
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        yield scratch
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def perform_in(job: Job, cells: Path) -> dict[str, Any]:
    """`perform` into the cell's folder of a sweep."""
    with settled(cells / job.name) as scratch:
        return perform(job, scratch)
