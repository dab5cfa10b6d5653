"""`diptych profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import TaskID
from rich.table import Table

from experiments.cli import options
from experiments.cli.app import app, console
from experiments.cli.options import gather, make_parent, progress
from experiments.cli.summary import startup_line


@app.command()
def profile(
    context: typer.Context,
    spec: options.Spec = None,
    model: options.Model = None,
    seconds: Annotated[float, typer.Option(help="About how long to measure.", min=1)] = 60.0,
    host_memory: options.HostMemory = None,
    disk: options.Disk = None,
    disk_folder: options.DiskFolder = None,
    settings: options.Set = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The calibration file.")] = Path("calibration.json"),
) -> None:
    """Measure this machine's runtime and fit the simulator's cost model to it; with --host-memory, swapping too.

    Example: diptych profile --seconds 60 --set limits.max_num_seqs=16 --out calibration.json
    """
    from experiments.profiling import profile as measure  # torch is slow to import

    # What is measured does not depend on the workload, but a specification has one.
    fields = {} if spec is not None else {"workload__name": "fixed", "workload__n": 1}
    specification = gather(context, model__source=model, **fields)
    make_parent(out)
    with progress("measuring", 100) as bar:
        fitted = measure(
            specification,
            seconds,
            on_progress=lambda share: bar.update(TaskID(0), completed=round(100 * share)),
            on_start=lambda parts: console.print(startup_line(parts)),
        )
    fitted.save(out)
    table = Table("steps", "part", "samples", "mean error %", "p50 %", "p90 %", title="Error on held-out steps")
    for error in fitted.calibration.held_out:
        table.add_row(
            error.regime,
            error.part,
            str(error.num_samples),
            *(f"{100 * e:.1f}" for e in (error.mean, error.p50, error.p90)),
        )
    console.print(table)
    lookups = fitted.calibration.lookups
    if lookups is not None:
        prompt, named, looked_up = (
            ns / 1e3 for ns in (lookups.num_named, lookups.named_blocks, lookups.looked_up_blocks)
        )
        console.print(
            f"Prefix caching costs the host {prompt:.1f} us a prompt, {named:.2f} us a block that is named and "
            f"{looked_up:.2f} us one that is looked up; its preparation is off by {lookups.held_out:.0%} on held-out "
            f"steps, {lookups.without:.0%} without that"
        )
    longest = specification.limits.max_model_len or 1024
    console.print(
        f"Calibration: {out}. Use it with: diptych simulate --calibration {out} --workload chat -n 100 --rate 1 "
        f"--set workload.length_scale=0.1 --set workload.max_model_len={longest}"
    )
