"""A comparison, and where its errors come from, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from experiments.attribution import Attribution
from experiments.compare import Comparison

_HEADINGS = {"real": "real", "sim": "simulated", "replay": "replayed", "client": "client"}


def headings(comparison: Comparison) -> tuple[str, str]:
    """What to call the two runs: by kind where they differ in it, else by name."""
    a, b = comparison.a, comparison.b
    if a.kind != b.kind:
        return _HEADINGS[a.kind], _HEADINGS[b.kind]
    return (a.name, b.name) if a.name != b.name else (str(a.folder), str(b.folder))


def difference_heading(comparison: Comparison) -> str:
    """A simulation has an error against what was measured; two measured or two simulated runs differ."""
    measured = ("real", "client")
    return "error" if comparison.a.kind in measured and comparison.b.kind not in measured else "difference"


def comparison_table(comparison: Comparison, noise: Mapping[str, float] | None = None) -> Table:
    """Latencies and throughput of both runs with the signed error of the second; notes in the caption.

    `noise`: how far repeats of the first run are from it (`repeats.noise_floor`), for a column beside the error.
    """
    a, b = headings(comparison)
    table = Table(
        title=Text(f"{comparison.a.label}  against  {comparison.b.label}"),
        caption=Text("\n".join(comparison.notes())),
        caption_justify="left",
        title_justify="left",
    )
    table.add_column("metric")
    table.add_column("unit")
    for heading in (a, b, difference_heading(comparison), *(["noise floor"] if noise else [])):
        table.add_column(Text(heading), justify="right")
    previous = ""
    for row in comparison.rows():
        group = row.metric.split()[0] if row.unit == "ms" else "throughput"
        if previous and group != previous:
            table.add_section()
        previous = group
        floor = [f"{noise[row.metric]:.1%}" if row.metric in noise else "–"] if noise else []
        table.add_row(row.metric, row.unit, row.a, row.b, row.error, *floor)
    return table


def attribution_table(attribution: Attribution) -> Table:
    """Of each mean latency's error the parts, and below them the worst steps and requests."""
    table = Table(
        title=Text("Where the simulation's errors come from"),
        caption=Text("\n".join(attribution.notes())),
        caption_justify="left",
        title_justify="left",
    )
    head, *heads = attribution.heads()
    table.add_column(head)
    for heading in heads:
        table.add_column(Text(heading), justify="right")
    for row in attribution.rows():
        table.add_row(*row)
    return table
