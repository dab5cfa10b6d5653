"""`diptych compare`, `replay`, `trace-export`, `policies` and `dashboard`."""

from __future__ import annotations

import inspect
import subprocess
import sys
from json import dumps
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from experiments.attribution import attribute, can_attribute
from experiments.cli import options
from experiments.cli.app import app, console
from experiments.cli.options import make_parent
from experiments.compare import compare as compare_runs
from experiments.compare import with_objectives
from experiments.divergence import diff_decisions
from experiments.records import check_free, read_run
from experiments.render import attribution_table, comparison_table
from policies import registry


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A run folder, usually the real one.")],
    second: Annotated[Path, typer.Argument(help="Another, usually its simulation.")],
    plots: Annotated[Path | None, typer.Option(help="Save the figures in this folder.")] = None,
    json: Annotated[Path | None, typer.Option(help="Save the figures as numbers in this file.")] = None,
    goodput: options.Goodput = None,
) -> None:
    """Put two runs side by side: latencies, throughput, errors, decisions; and of a simulation by a calibration, which
    part of it the errors come from.

    Example: diptych compare runs/chat-mixed-real runs/chat-mixed-sim --plots plots --goodput ttft:500
    """
    slo = options.objectives(goodput or [])
    runs = read_run(first), read_run(second)
    if json is not None:
        make_parent(json)
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
    comparison = with_objectives(compare_runs(*runs), slo)
    console.print(comparison_table(comparison))
    found = attribute(*runs) if can_attribute(*runs) else None
    if found is not None:
        console.print(attribution_table(found))
    if json is not None:
        content = comparison.as_dict() | ({} if found is None else {"attribution": found.as_dict()})
        json.write_text(dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
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

    run = run if run.name not in ("", "..") else run.resolve()
    folder = out or run.with_name(run.name + "-replay")
    check_free(folder, overwrite)
    recorded = read_run(run)
    replay_run(recorded, folder, overwrite=overwrite)
    replayed = read_run(folder)
    divergence = diff_decisions(recorded, replayed)
    steps = f"{len(recorded.steps):,} steps, {len(recorded.decisions):,} decisions"
    if divergence is not None:
        console.print(Text.assemble(("The decisions differ.", "red"), f" {steps}. {divergence}"))
        raise typer.Exit(1)
    console.print(Text.assemble(("Zero divergences.", "green"), f" {steps}. Records: {folder}"))


@app.command()
def trace_export(
    run: Annotated[Path, typer.Argument(help="The run folder of a real, simulated or replayed run.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file (RUN.trace.json.gz).")] = None,
) -> None:
    """Write a run as a trace: steps, queues, memory and requests, for ui.perfetto.dev or chrome://tracing.

    Example: diptych trace-export runs/chat-mixed-sim
    """
    from experiments.trace_export import write_trace

    recorded = read_run(run)
    file = out or Path(f"{recorded.name}.trace.json.gz")
    make_parent(file)
    written = write_trace(recorded)
    file.write_bytes(written)
    console.print(f"{len(recorded.steps):,} steps, {len(recorded.requests):,} requests, {len(written):,} bytes: {file}")
    console.print("Open it in ui.perfetto.dev or chrome://tracing")


@app.command()
def policies(
    name: Annotated[
        str | None, typer.Argument(help="Show one policy, or module:Class: what it does, its source and knobs.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="The list as docs/policies.md has it.")] = False,
) -> None:
    """List the policies by role, or show one.

    Example: diptych policies sarathi
    """
    if markdown:
        typer.echo("\n\n".join(_markdown(role) for role in registry.ROLES))
        return
    if name is None:
        for role in registry.ROLES:
            table = Table(title=role, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
            for known in registry.names(role):
                table.add_row(Text(known, style="bold"), _summary(role, known))
            console.print(table)
        return
    for role in registry.roles(name):
        _show(role, name)


def _summary(role: str, name: str) -> str:
    policy = registry.find(role, name)
    return (inspect.getdoc(policy) or "").split("\n", 1)[0] + (
        " Simulations only." if registry.moves_kv(policy) else ""
    )


def _markdown(role: str) -> str:
    """One role as a table: names, first lines of the docstrings, knobs with their defaults. Of the library alone."""
    rows = [f"## {role}", "", "| name | what it does | knobs |", "| --- | --- | --- |"]
    for name in registry.names(role):
        policy = registry.find(role, name)
        if not policy.__module__.startswith("policies."):
            continue
        knobs = {k: p for k, p in registry.knobs(policy).items() if k not in registry.CONTEXT}
        values = (k if p.default is p.empty else f"{k}={p.default}" for k, p in knobs.items())
        cells = [f"`{name}`", _summary(role, name).replace("|", "\\|"), ", ".join(f"`{value}`" for value in values)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _show(role: str, name: str) -> None:
    policy = registry.find(role, name)
    console.print(Text.assemble((f"{role} {name}", "bold"), f"  ({policy.__module__}:{policy.__name__})\n"))
    console.print(inspect.getdoc(policy) or "")
    knobs = {k: p for k, p in registry.knobs(policy).items() if k not in registry.CONTEXT}
    if knobs:
        console.print("\nKnobs:")
        for knob, parameter in knobs.items():
            needed = parameter.default is parameter.empty
            console.print(f"  {knob}: must be given" if needed else f"  {knob} = {parameter.default!r}")
    optional = [f",{knob}={p.default}" for knob, p in knobs.items() if p.default is not p.empty]
    required = [f",{knob}=..." for knob, p in knobs.items() if p.default is p.empty]
    example = name + "".join(required or optional[:1])
    flag = f"--queue sjf,predictor={example.replace(',', '/')}" if role == "predictor" else f"--{role} {example}"
    console.print(f"\nExample: diptych simulate --workload chat -n 500 --rate 4 {flag}")


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
