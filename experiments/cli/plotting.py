"""`diptych plot`: figures of runs and sweeps, for a paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.cli.app import app, console
from experiments.cli.options import make_parent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

plot = typer.Typer(
    help="Figures of runs and sweeps, ready for a paper.\n\n"
    "Start with: diptych plot cdf runs/chat-mixed-sim runs/chat-sarathi-sim -o latency.pdf",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(plot, name="plot")

LATENCIES = {"ttft": "ttft_ms", "tpot": "tpot_ms", "e2e": "e2e_ms"}

Runs = Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN...")]
Cells = Annotated[
    list[Path], typer.Argument(help="Run folders, folders of runs, or a sweep's folder.", metavar="FOLDER...")
]
Out = Annotated[
    list[Path], typer.Option("--out", "-o", help="The file: .pdf, .svg or .png; may be repeated for several.")
]
Width = Annotated[
    str | None, typer.Option(help="column (3.33 inches), page (7), or a number of inches; else what suits the figure.")
]


@plot.command()
def cdf(
    runs: Runs,
    out: Out,
    metric: Annotated[list[str] | None, typer.Option(help="ttft, tpot or e2e; may be repeated (all three).")] = None,
    width: Width = None,
) -> None:
    """Distribution functions of latencies, runs overlaid.

    Example: diptych plot cdf runs/chat-mixed-real runs/chat-mixed-sim --metric ttft --width column -o ttft.pdf
    """
    from experiments.metrics import per_request
    from experiments.paper import cdf_figure

    columns = [_named(LATENCIES, one, "--metric") for one in metric or LATENCIES]
    _draw(out, width, lambda: cdf_figure(_of_runs(runs, per_request), columns))


@plot.command()
def timeline(runs: Runs, out: Out, width: Width = None) -> None:
    """Running and waiting requests and KV memory over time, runs overlaid.

    Example: diptych plot timeline runs/chat-mixed-sim runs/chat-sarathi-sim -o queues.pdf
    """
    from experiments.plots import timeline_figure
    from experiments.timeline import timeline as states

    _draw(out, width or "page", lambda: timeline_figure(_of_runs(runs, states)))


@plot.command()
def curve(
    folders: Cells,
    out: Out,
    y: Annotated[list[str] | None, typer.Option(help="A figure, as p99_ttft_ms; may be repeated.")] = None,
    x: Annotated[str, typer.Option(help="What was varied; a field of the specification.")] = "workload.rate",
    log: Annotated[bool, typer.Option("--log", help="Logarithmic upwards.")] = False,
    width: Width = None,
) -> None:
    """A figure over what was varied, as latency over the rate; a line a policy, a band where there are several seeds.

    Example: diptych plot curve sweeps/rates --y median_ttft_ms --y p99_tpot_ms -o latency.pdf
    """
    import pandas as pd

    from experiments.figure_rows import gather, label_of
    from experiments.paper import curve_figure

    def make() -> Figure:
        rows = gather(folders)
        ys = y or ["median_ttft_ms"]
        _check_figures(rows, ys)
        known = [row for row in rows if isinstance(row["knobs"].get(x), int | float)]
        if not known:
            varied = sorted(
                {knob for row in rows for knob, value in row["knobs"].items() if not isinstance(value, str)}
            )
            raise ValueError(f"--x {x}: no run has such a number; there are {', '.join(varied) or 'none'}")
        table = pd.DataFrame(
            [{"series": _series(row), x: row["knobs"][x], **{of: row[of] for of in ys}} for row in known]
        )
        return curve_figure(table, (x, label_of(x)), [(of, label_of(of)) for of in ys], log)

    _draw(out, width, make)


@plot.command()
def pareto(
    folders: Cells,
    out: Out,
    x: Annotated[str, typer.Option(help="The figure across.")] = "output_throughput",
    y: Annotated[str, typer.Option(help="The figure upwards.")] = "p99_ttft_ms",
    width: Width = None,
) -> None:
    """Two figures of all runs against each other; those that no other run beats in both are joined.

    Example: diptych plot pareto sweeps/policies --x output_throughput --y p99_ttft_ms -o pareto.pdf
    """
    import pandas as pd

    from experiments.figure_rows import gather
    from experiments.paper import pareto_figure
    from experiments.study import OBJECTIVES

    for given, flag in ((x, "--x"), (y, "--y")):
        _named({name: name for name in OBJECTIVES}, given, flag)

    def make() -> Figure:
        rows = gather(folders)
        _check_figures(rows, [x, y])
        return pareto_figure(pd.DataFrame(rows), x, y)

    _draw(out, width, make)


@plot.command()
def heat(
    folders: Cells,
    out: Out,
    x: Annotated[str, typer.Option(help="The knob across; a field of the specification.")],
    y: Annotated[str, typer.Option(help="The knob upwards.")],
    of: Annotated[str, typer.Option(help="The figure of each cell.")] = "p99_ttft_ms",
    width: Width = None,
) -> None:
    """A figure over two knobs, each cell with its number.

    Example: diptych plot heat sweeps/chunks --x policies.scheduler.chunk_size --y workload.rate -o chunks.pdf
    """
    from experiments.figure_rows import gather
    from experiments.study import OBJECTIVES, grid
    from experiments.study_plots import heat_figure

    _named({name: name for name in OBJECTIVES}, of, "--of")

    def make() -> Figure:
        rows = gather(folders)
        _check_figures(rows, [of])
        cells = grid(rows, x, y, of)
        if cells.empty:
            varied = sorted({knob for row in rows for knob in row["knobs"]})
            raise ValueError(f"no run has both {x} and {y}; there are {', '.join(varied)}")
        return heat_figure(cells, x, y, of)

    _draw(out, width, make)


def _draw(out: Sequence[Path], width: str | None, make: Callable[[], Figure]) -> None:
    from experiments.paper import check_format, save  # matplotlib is slow to import

    inches = _inches(width)
    for path in out:
        check_format(path)
        make_parent(path)
    figure = make()
    for path in out:
        save(figure, path, inches)
        console.print(f"Figure: {path}")


def _inches(width: str | None) -> float | None:
    from experiments.paper import COLUMN, PAGE

    if width is None:
        return None
    named = {"column": COLUMN, "page": PAGE}
    try:
        inches = named[width] if width in named else float(width)
    except ValueError:
        inches = 0.0
    if not 1 <= inches <= 40:
        raise ValueError(f"--width {width}: give column, page, or 1 to 40 inches")
    return inches


def _of_runs(folders: Sequence[Path], frame: Callable[[Any], Any]) -> dict[str, Any]:
    """Label -> a frame of the run. Runs of one label are told apart by their folders."""
    from experiments.records import read_run

    runs = [read_run(folder) for folder in folders]
    labels = [run.label for run in runs]
    if len(set(labels)) < len(labels):
        labels = [folder.name for folder in folders]
    if len(set(labels)) < len(labels):
        labels = [str(folder) for folder in folders]
    return {label: frame(run) for label, run in zip(labels, runs, strict=True)}


def _series(row: dict[str, Any]) -> str:
    return str(row["policy"]) + (f" ({row['kind']})" if row["kind"] not in ("sim", "real") else "")


def _named(known: dict[str, str], given: str, flag: str) -> str:
    if given not in known:
        raise ValueError(f"{flag} {given}: there is none; give one of {', '.join(known)}")
    return known[given]


def _check_figures(rows: Sequence[dict[str, Any]], wanted: Sequence[str]) -> None:
    from experiments.figure_rows import figures_of

    known = figures_of(rows)
    for name in wanted:
        if name not in known:
            raise ValueError(f"no run has the figure {name!r}; there are {', '.join(known)}")
