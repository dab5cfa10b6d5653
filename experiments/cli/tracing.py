"""`diptych trace`: describe, slice, scale, mix and convert traces."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import TaskID

from experiments.cli.app import app, console
from experiments.cli.options import make_parent, progress
from experiments.workloads import FORMATS, Workload, load
from experiments.workloads.converting import TARGETS, write
from experiments.workloads.describing import describe_file
from experiments.workloads.lines import on_read
from experiments.workloads.loaders import OWN_FORMAT
from experiments.workloads.mixing import mix as mix_traces
from experiments.workloads.mixing import of_tenants, within
from experiments.workloads.prefix_sharing import CAPACITIES
from experiments.workloads.trace_text import trace_text

TASK = TaskID(0)

trace = typer.Typer(
    help="Describe, slice, scale, mix and convert traces of requests.\n\nStart with: diptych trace describe FILE",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(trace, name="trace")

Source = Annotated[Path, typer.Argument(help="A trace file of any known format, plain or gzipped.", metavar="FILE")]
Format = Annotated[str, typer.Option(help=f"auto, or one of {', '.join(FORMATS)}.")]
Target = Annotated[str, typer.Option("--to", help=f"The format of the new file: {', '.join(TARGETS)}.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The new file; gzipped if its name ends in .gz.")]
Overwrite = Annotated[bool, typer.Option(help="Replace the file if there is one.")]


@trace.command()
def describe(
    files: Annotated[list[Path], typer.Argument(help="Trace files of any known format.", metavar="FILE...")],
    format: Format = "auto",
    capacity: Annotated[
        list[int] | None,
        typer.Option(help="Blocks of a cache of the LRU hit curve, instead of 500 to 100,000; may be repeated."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Save the figures as numbers in this file, by trace.")] = None,
) -> None:
    """Say what is in a trace: rates, burstiness, lengths, tenants, sessions, shared prefixes, and the LRU hit curve.

    Example: diptych trace describe conversation_trace.jsonl.gz --capacity 1000 --capacity 10000
    """
    if json is not None:
        make_parent(json)
    found = {}
    for path in files:
        with _reading(path, "looking for prefixes") as tell:
            found[str(path)] = describe_file(path, format, capacities=capacity or CAPACITIES, tell=tell)
        console.print(trace_text(path.name, found[str(path)]))
    if json is not None:
        json.write_text(jsonlib.dumps(found, indent=1) + "\n", encoding="utf-8")
        console.print(f"Numbers: {json}")


@trace.command("slice")
def slice_(
    file: Source,
    out: Out,
    from_s: Annotated[float, typer.Option("--from", help="Seconds since the first arrival.", min=0)] = 0.0,
    until_s: Annotated[float | None, typer.Option("--until", help="Seconds; requests before it are kept.")] = None,
    n: Annotated[int | None, typer.Option("--requests", "-n", help="At most so many, the first ones.", min=1)] = None,
    tenant: Annotated[list[str] | None, typer.Option(help="Only of this tenant; may be repeated.")] = None,
    format: Format = "auto",
    to: Target = OWN_FORMAT,
    overwrite: Overwrite = False,
) -> None:
    """Keep a part of a trace: of some time, of some tenants, the first requests.

    Example: diptych trace slice day.csv -o hour.jsonl.gz --from 3600 --until 7200 --tenant client-3
    """
    _check_target(out, to, overwrite)
    workload = _load(file, format)
    if tenant:
        workload = of_tenants(workload, tenant)
    if from_s or until_s is not None:
        workload = within(workload, from_s, until_s)
    _save(workload if n is None else workload.slice(n), out, to)


@trace.command()
def scale(
    file: Source,
    out: Out,
    rate: Annotated[float | None, typer.Option(help="Requests a second; all times are scaled to it.")] = None,
    time: Annotated[
        float | None, typer.Option(help="Multiply all times, think times too: 0.5 is twice as fast.")
    ] = None,
    lengths: Annotated[float | None, typer.Option(help="Multiply all lengths, and prefix blocks with them.")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Then cut what does not fit a context of so many tokens.", min=2)
    ] = None,
    format: Format = "auto",
    to: Target = OWN_FORMAT,
    overwrite: Overwrite = False,
) -> None:
    """Make a trace faster or slower, or its requests longer or shorter.

    Example: diptych trace scale conversation_trace.jsonl.gz -o slow.jsonl.gz --rate 1.5 --lengths 0.25
    """
    if rate is not None and time is not None:
        raise ValueError("--rate and --time both scale the times; give one of them")
    if rate is time is lengths is max_model_len is None:
        raise ValueError("say what to scale: --rate, --time, --lengths or --max-model-len")
    _check_target(out, to, overwrite)
    workload = _load(file, format)
    if rate is not None:
        workload = workload.scale_rate(rate)
    if time is not None:
        workload = workload.scale_time(time)
    if lengths is not None:
        workload = workload.scale_lengths(lengths)
    _save(workload if max_model_len is None else workload.clip(max_model_len), out, to)


@trace.command()
def mix(
    files: Annotated[list[Path], typer.Argument(help="Two traces or more, of any known formats.", metavar="FILE...")],
    out: Out,
    format: Format = "auto",
    to: Target = OWN_FORMAT,
    overwrite: Overwrite = False,
) -> None:
    """Put several traces together, each request at its time; who has no tenant gets its trace's name for one.

    Example: diptych trace mix chat.jsonl code.csv -o both.jsonl.gz
    """
    _check_target(out, to, overwrite)
    _save(mix_traces([_load(file, format) for file in files], out.name.split(".")[0]), out, to)


@trace.command()
def convert(
    file: Source,
    out: Out,
    to: Target,
    format: Format = "auto",
    block_size: Annotated[
        int | None, typer.Option(help="Tokens of a prefix block in the new file (as before).", min=1)
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a trace in another format: ours, Mooncake's, or vLLM's timed trace.

    Example: diptych trace convert conversation_trace.jsonl.gz --to timed_trace --block-size 16 -o timed.jsonl
    """
    _check_target(out, to, overwrite)
    _save(_load(file, format), out, to, block_size)


def _check_target(out: Path, to: str, overwrite: bool) -> None:
    if to not in TARGETS:
        raise ValueError(f"--to {to}: there is no such format to write; give one of {', '.join(TARGETS)}")
    make_parent(out)
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists; give another file with -o, or --overwrite")


def _load(path: Path, format: str) -> Workload:
    with _reading(path):
        return load(path, format)


def _save(workload: Workload, out: Path, to: str, block_size: int | None = None) -> None:
    with progress(f"writing {out.name}", len(workload)) as bar:
        lost = write(workload, out, to, block_size=block_size, tell=lambda done: bar.update(TASK, completed=done))
    if lost:
        console.print(f"{to} has no place for {', '.join(lost)}: left out")
    console.print(f"{len(workload):,} requests in {workload.span_s:,.1f} s: {out}")


@contextmanager
def _reading(path: Path, then: str = "") -> Iterator[Callable[[int], object]]:
    """A bar of the bytes read; what it gives counts requests of the work that comes `then`."""
    size = path.stat().st_size if path.is_file() else None
    with progress(f"reading {path.name}", size) as bar:
        told = on_read.set(lambda position: bar.update(TASK, completed=position))
        try:
            yield lambda done: bar.update(TASK, description=f"{then}, request {done:,}", completed=done, total=None)
        finally:
            on_read.reset(told)
