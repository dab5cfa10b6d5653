"""`diptych sweep`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import TaskID
from rich.table import Table

from experiments.cli.app import app, complain, console
from experiments.cli.failures import INTERRUPTED
from experiments.cli.options import Processes, RayAddress, ResultFolder, progress
from experiments.compare import format_figure
from experiments.records.environment import usable_cores
from experiments.spec import SpecError
from experiments.sweeps import Cell, Sweep, read_sweep, run_sweep, state_of
from experiments.sweeps.summary import known_metrics
from experiments.sweeps.table import means, value_text
from policies.registry import nearest

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 40
"""Rows of a table on the screen; all of them are in the files."""


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="A YAML file: base, variables, and how runs are measured.")],
    out: ResultFolder = None,
    processes: Processes = None,
    ray: RayAddress = None,
    keep_outdated: Annotated[
        bool, typer.Option("--keep-outdated", help="Keep finished cells that were run by other code than this.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells, and which are to be run.")] = False,
) -> None:
    """Vary any field of a run over grids, zips and seeds, and put the results into one table.

    Cells that the folder holds are kept, so what was stopped goes on with the same command. A cell that fails is said
    and listed, and the others go on; the exit status is then 1.

    Example: diptych sweep examples/sweep.yaml -o sweeps/schedulers
    """
    asked = read_sweep(file)
    folder = out or Path("sweeps") / file.stem
    if dry_run:
        _list(asked, folder, keep_outdated)
        return
    check_places(ray, processes)
    failed: list[str] = []
    done = 0
    with progress("sweeping", len(asked.cells)) as bar:

        def say(cell: Cell, note: dict[str, Any]) -> None:
            nonlocal done
            done += 1
            if note["status"] != "ok":
                failed.append(cell.name)
                complain(f"{cell.name} failed: {note['error']}")
            bar.update(TaskID(0), completed=done)

        try:
            table = run_sweep(
                asked,
                folder,
                runner=None if ray is None else on_cluster(ray),
                processes=processes or usable_cores(),
                keep_outdated=keep_outdated,
                say=say,
            )
        except KeyboardInterrupt:
            kept = f"{done - len(failed)} of {len(asked.cells)} cells are in {folder}"
            complain(f"interrupted; {kept}, and the same command goes on from there")
            raise typer.Exit(INTERRUPTED) from None
    _show(asked, table)
    console.print(f"Table: {folder / 'results.parquet'} (and .csv). Summary: {folder / 'summary.md'}")
    if failed:
        complain(f"{len(failed)} of {len(asked.cells)} cells failed; the same command tries them again")
        raise typer.Exit(1)


def on_cluster(ray: str) -> Any:
    """What runs cells on a Ray cluster, which this process joins."""
    from experiments.sweeps.ray_cluster import connected

    return connected(ray)


def check_places(ray: str | None, processes: int | None) -> None:
    """Raise SpecError where runs are to go to two places."""
    if ray is not None and processes is not None:
        raise SpecError("--ray runs as many cells at once as the cluster has room for; leave --processes out")


def _list(asked: Sweep, folder: Path, keep_outdated: bool) -> None:
    """The cells, and what would be done with them."""
    state = state_of(asked.cells, folder, keep_outdated)
    for cell in asked.cells:
        what = "finished" if cell.name in state.finished else "outdated" if cell.name in state.outdated else "to run"
        values = {**cell.values, **({} if cell.seed is None else {"seed": cell.seed}), "panel": cell.panel}
        console.print(f"{what:9} {cell.name}  {' '.join(f'{field}={value_text(of)}' for field, of in values.items())}")
    counts = Counter(cell.panel for cell in state.missing(asked.cells))
    told = ", ".join(f"{count} {panel}" for panel, count in sorted(counts.items())) or "none"
    console.print(f"{len(asked.cells)} cells, to run: {told}")


def _show(asked: Sweep, table: pd.DataFrame) -> None:
    """Means over seeds; as many figures as the terminal has room for."""
    metrics = known_metrics(asked, table)
    for metric in asked.spec.metrics or ():
        if metric not in table:
            near = nearest(metric, [str(name) for name in table])
            complain(f"metrics: runs have no figure {metric}; {near}results.csv has all of them")
    fields = [*asked.spec.variables.fields, *(["panel"] if table["panel"].nunique() > 1 else [])]
    found = means(table, asked.spec, metrics)
    rows = [
        [*(str(values[field]) for field in fields), *(format_figure(f.mean if f else None) for f in figures.values())]
        for values, figures in found
    ]
    whole = {tuple(row[: len(fields)]) for row in rows}
    tried = dict.fromkeys(tuple(str(row[field]) for field in fields) for row in table.to_dict("records"))
    rows += [[*values, *("failed" for _ in metrics)] for values in tried if values not in whole]
    console.print(_fitting(fields, metrics, rows[:SHOWN]))
    counts = {figure.count for _, figures in found for figure in figures.values() if figure is not None}
    if counts and max(counts) > 1:
        fewer = f"{min(counts)} to " if min(counts) < max(counts) else ""
        console.print(f"Means over {fewer}{max(counts)} seeds")
    if len(rows) > SHOWN:
        console.print(f"{len(rows) - SHOWN} more rows")


def _fitting(fields: Sequence[str], metrics: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Fields folded where they are long, and as many figures as there is room for, at least one; the caption names the
    others."""
    titles = [*(field.rsplit(".", 1)[-1] for field in fields), *(metric.replace("_", " ") for metric in metrics)]
    widths = [max(len(text) for text in (*title.split(), *(row[i] for row in rows))) for i, title in enumerate(titles)]
    for i, _ in enumerate(fields):
        widths[i] = min(widths[i], max(8, (console.width - 30) // len(fields)))
    ends = list(accumulate(3 + width for width in widths))
    shown = max(len(fields) + 1, sum(end < console.width for end in ends))
    table = Table()
    for i, title in enumerate(titles[:shown]):
        table.add_column(title, justify="left" if i < len(fields) else "right", width=widths[i], overflow="fold")
    for row in rows:
        table.add_row(*row[:shown])
    if shown < len(titles):
        table.caption, table.caption_justify = f"no room for {', '.join(titles[shown:])}", "left"
    return table
