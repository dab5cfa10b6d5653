"""`diptych validate`."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.cli.app import app, complain, console
from experiments.cli.failures import INTERRUPTED
from experiments.fidelity.archive import pack, unpack
from experiments.fidelity.matrix import QUICK_SIZES, Sizes
from experiments.fidelity.sim_half import evaluate
from experiments.fidelity.tables import markdown, missed
from experiments.fidelity.validation import full, measure, quick, trace_files
from experiments.spec import SpecError


@app.command()
def validate(
    model: Annotated[str, typer.Option("--model", "-m", help="A preset's shape, with random weights.")] = "qwen3-0.6b",
    device: Annotated[str, typer.Option(help="Where it is served.")] = "cuda",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the records (validation/MODEL).")] = None,
    small: Annotated[bool, typer.Option("--quick", help="A tiny model and a few short runs, on the CPU.")] = False,
    records: Annotated[
        Path | None,
        typer.Option("--from", help="Only the simulated half: of such a folder, or of one packed as a .tar."),
    ] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds for the runs; rest: next time.", min=1)] = None,
    profile_seconds: Annotated[float | None, typer.Option(help="Of calibration (100; --quick: 3).", min=1)] = None,
    cell_seconds: Annotated[float | None, typer.Option(help="Of arrivals a run (20; --quick: 1.5).", min=0.1)] = None,
    guess: Annotated[float, typer.Option(help="The capacity in chats a second, roughly.", min=0.01)] = 20.0,
    trace: Annotated[
        list[str] | None,
        typer.Option(help="WORKLOAD=FILE: lengths of a trace in place of a generator's; may be repeated."),
    ] = None,
    processes: Annotated[int, typer.Option(help="Of the simulated half.", min=1)] = min(8, os.cpu_count() or 1),
    archive: Annotated[Path | None, typer.Option(help="Also keep all of the folder in this one .tar.")] = None,
    strict: Annotated[bool, typer.Option(help="End with status 1 if a target is missed.")] = False,
) -> None:
    """Serve a matrix of workloads, loads and policies for real, replay and simulate each run, and say how far apart
    the panels are. Runs that the folder holds are kept, so what was stopped goes on.

    Example: diptych validate --quick --out validation/quick
    """
    started = time.monotonic()

    def say(line: str) -> None:
        console.print(f"[{time.monotonic() - started:6.1f} s] {line}", markup=False, highlight=False, soft_wrap=True)

    if small and trace:
        raise SpecError("--trace: the quick matrix has no traces; leave --quick or --trace out")
    with tempfile.TemporaryDirectory() as scratch:
        if records is not None:
            folder = _unpacked(records, Path(scratch)) if records.is_file() else records
        else:
            folder = out or Path("validation") / ("quick" if small else Path(model).name)
            base, works, cells = quick() if small else full(model, device, trace_files(trace or ()))
            given = {"profile_seconds": profile_seconds, "cell_seconds": cell_seconds}
            asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
            sizes = replace(QUICK_SIZES if small else Sizes(guess=guess), **asked)
            try:
                measure(base, works, cells, folder, sizes, limit_s=time_limit, say=say)
            except KeyboardInterrupt:
                complain(f"interrupted; the runs that were finished are in {folder}, and the same command goes on")
                raise typer.Exit(INTERRUPTED) from None
        found = evaluate(folder, processes=processes, say=say)
        table = markdown(found)
        (folder / "fidelity.md").write_text(table)
        if archive is not None:
            pack(folder, archive)
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    if records is None:
        console.print(f"Records, fidelity.json and fidelity.md: {folder}. Again: diptych validate --from {folder}")
    if strict and missed(found):
        complain(f"{missed(found)} figures miss their targets")
        raise typer.Exit(1)


def _unpacked(archive: Path, scratch: Path) -> Path:
    """The folder of records in an archive. Raises SpecError unless there is one."""
    unpack(archive, scratch)
    folders = [path.parent for path in scratch.rglob("matrix.json")]
    if len(folders) != 1:
        names = ", ".join(str(folder.relative_to(scratch)) for folder in sorted(folders))
        raise SpecError(f"{archive} holds {names or 'no records'}; give one with one folder, or unpack it and name one")
    return folders[0]
