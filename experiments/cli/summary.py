"""One run as a table."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc
from rich.table import Table
from rich.text import Text

from experiments.compare import format_figure
from experiments.economy import economy
from experiments.metrics import outline, summarize
from experiments.records import Run
from experiments.sweeps.measuring import MANY_TOKENS


def startup_line(seconds: dict[str, float]) -> str:
    """What the parts of a start took: seconds by the part's name, in their order."""
    parts = ", ".join(f"{name.replace('_', ' ')} {took:.2f}" for name, took in seconds.items())
    return f"started in {sum(seconds.values()):.2f} s: {parts}"


def changing(run: Run) -> bool:
    """Whether replicas differ, or come and go."""
    return "replicas" in run.info["tables"]


def economy_line(figures: dict[str, Any]) -> str:
    """What the replicas took: time, and estimates of energy and money."""
    busy = figures["busy_share"]
    parts = [f"{format_figure(figures['replica_seconds'])} replica seconds"]
    parts += [] if busy is None else [f"devices busy {busy:.0%} of that"]
    for key, unit in (
        ("estimated_joule_per_output_token", "J an output token"),
        ("estimated_price_per_million_output_tokens", "for a million output tokens at the price given"),
    ):
        if figures[key] is not None:
            parts.append(f"about {format_figure(figures[key])} {unit} (estimate)")
    return "; ".join(parts)


def summary_table(run: Run, of: str) -> Table:
    """Throughput and latencies of one run, and what became of its requests. `of`: the model and where it ran.

    Without gaps between tokens where there are more than `MANY_TOKENS` of them.
    """
    tokens = pc.sum(run.columns("requests", ["output_tokens"])["output_tokens"]).as_py() or 0
    figures = (outline if tokens > MANY_TOKENS else summarize)(run, percentiles=(50, 90, 99))
    if "replica_seconds" not in figures:
        figures |= economy(run, figures["total_output_tokens"])
    table = Table("latency, ms", title=Text(f"{run.label}: {of}"), title_justify="left")
    for heading in ("mean", "p50", "p90", "p99"):
        table.add_column(heading, justify="right")
    for metric, name in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "E2E")):
        table.add_row(name, *(format_figure(figures[f"{kind}_{metric}_ms"]) for kind in ("mean", "p50", "p90", "p99")))
    if figures.get("programs"):
        kinds = (f"{kind}_program_ms" for kind in ("mean", "p50", "p90", "p99"))
        table.add_row(f"{figures['programs']} programs", *(format_figure(figures[kind]) for kind in kinds))
    statuses = ", ".join(f"{count} {status}" for status, count in figures["statuses"].items() if count)
    if "retries" in figures:
        statuses += f"; {figures['retries']} more tries, {figures['answered']} answered in the end"
        kinds = (f"{kind}_answer_ms" for kind in ("mean", "p50", "p90", "p99"))
        table.add_row("with retries", *(format_figure(figures[kind]) for kind in kinds))
    table.caption = Text(
        f"{format_figure(figures['request_throughput'])} requests/s, "
        f"{format_figure(figures['output_throughput'])} output tokens/s; {statuses}"
        + ("" if figures["preemptions"] is None else f"; {figures['preemptions']} preemptions")
    )
    if figures.get("estimated_joule_per_output_token") is not None or changing(run):
        table.caption.append("\n" + economy_line(figures))
    table.caption_justify = "left"
    return table
