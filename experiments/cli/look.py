"""`diptych compare`, `replay`, `policies` and `dashboard`."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from experiments.cli import options
from experiments.cli.app import app, console
from experiments.compare import compare as compare_runs
from experiments.divergence import diff_decisions
from experiments.records import read_run
from experiments.render import comparison_table
from policies import registry


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A run folder, usually the real one.")],
    second: Annotated[Path, typer.Argument(help="Another, usually its simulation.")],
    plots: Annotated[Path | None, typer.Option(help="Save the figures in this folder.")] = None,
    json: Annotated[Path | None, typer.Option(help="Save the figures as numbers in this file.")] = None,
) -> None:
    """Put two runs side by side: latencies, throughput, errors, decisions.

    Example: diptych compare runs/chat-mixed-real runs/chat-mixed-sim --plots plots
    """
    comparison = compare_runs(read_run(first), read_run(second))
    console.print(comparison_table(comparison))
    if json is not None:
        json.write_text(comparison.to_json() + "\n", encoding="utf-8")
        console.print(f"Numbers: {json}")
    if plots is not None:
        from experiments.plots import save_figures  # matplotlib is slow to import

        save_figures(comparison, plots)
        console.print(f"Figures: {plots}")


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="The run folder of a real or simulated run.")],
    out: options.Out = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Feed a run's arrivals and step times to the simulator; every plan must come out the same.

    Example: diptych replay runs/chat-mixed-real

    Exit status 1 if they do not.
    """
    from experiments.replaying import replay_run

    folder = out or run.with_name(run.name + "-replay")
    recorded = read_run(run)
    replay_run(recorded, folder, overwrite=overwrite)
    replayed = read_run(folder)
    divergence = diff_decisions(recorded, replayed)
    steps = f"{len(recorded.steps):,} steps, {len(recorded.decisions):,} decisions"
    if divergence is not None:
        console.print(f"[red]The decisions differ.[/red] {steps}. {divergence}")
        raise typer.Exit(1)
    console.print(f"[green]Zero divergences.[/green] {steps}. Records: {folder}")


@app.command()
def policies(
    name: Annotated[str | None, typer.Argument(help="Show one policy: its description, source and knobs.")] = None,
) -> None:
    """List the policies by role, or show one.

    Example: diptych policies sarathi
    """
    if name is None:
        for role in registry.ROLES:
            table = Table(title=role, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
            for known in registry.names(role):
                summary = (inspect.getdoc(registry.find(role, known)) or "").split("\n", 1)[0]
                table.add_row(f"[bold]{known}[/bold]", summary)
            console.print(table)
        return
    roles = [role for role in registry.ROLES if name in registry.names(role)]
    if not roles:
        everything = sorted({known for role in registry.ROLES for known in registry.names(role)})
        near = registry.nearest(name, everything)
        raise registry.PolicyError(f"there is no policy {name!r}; {near}known: {', '.join(everything)}")
    for role in roles:
        _show(role, name)


def _show(role: str, name: str) -> None:
    policy = registry.find(role, name)
    console.print(f"[bold]{role} {name}[/bold]  ({policy.__module__}:{policy.__name__})\n")
    console.print(inspect.getdoc(policy) or "", markup=False, soft_wrap=True)
    knobs = {k: p for k, p in registry.knobs(policy).items() if k not in registry.CONTEXT}
    if knobs:
        console.print("\nKnobs:")
        for knob, parameter in knobs.items():
            console.print(f"  {knob} = {parameter.default!r}", markup=False)
    example = name + "".join(f",{knob}={parameter.default}" for knob, parameter in list(knobs.items())[:1])
    console.print(
        f"\nExample: diptych simulate --workload chat -n 500 --rate 4 --{role} {example}", markup=False, soft_wrap=True
    )


@app.command()
def dashboard(
    root: Annotated[Path, typer.Argument(help="The folder that holds the run folders.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=1, max=65535)] = 8501,
) -> None:
    """Open the dashboard over a folder of runs, in the browser at http://127.0.0.1:PORT.

    Example: diptych dashboard demo
    """
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; make a run first, as with: diptych demo")
    command = [sys.executable, "-m", "dashboard", str(root), "--port", str(port)]
    raise typer.Exit(subprocess.run(command, check=False).returncode)
