"""Results of the serving benchmark: one JSON file a model, and its table as text or Markdown."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.reference import VLLM, metrics

Result = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
HEADER = ("what", "unit", "ours", VLLM, "times better", "target", "floor", "")


def out_folder() -> Path:
    """Where results go: `DIPTYCH_BENCH_OUT`, else benchmarks/results."""
    return Path(os.environ.get("DIPTYCH_BENCH_OUT") or "benchmarks/results")


def result_path(folder: Path, model: str, small: bool) -> Path:
    """A small run never takes a real one's place."""
    return folder / f"gpu-serving-{model}{'-small' if small else ''}.json"


def save(result: Result, path: Path) -> None:
    """Written whole or not at all: a run that is killed keeps what it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


def read(path: Path) -> Result:
    """A saved result. Raises ValueError for a file that is none."""
    result = json.loads(path.read_text())
    if not isinstance(result, dict) or result.get("benchmark") != "gpu_serving":
        raise ValueError(f"{path} is no result of benchmarks.gpu.serving")
    return result


def header(module: str) -> Result:
    """What every result of a kernel's benchmark begins with: the card, the software, the day, the command."""
    import torch  # the serving benchmark's own process does without

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"python -m {' '.join([module, *sys.argv[1:]])}",
        "revision": revision(),
    }


def revision() -> str | None:
    """The commit this code was checked out from; `DIPTYCH_REVISION` says it where there is no checkout."""
    if os.environ.get("DIPTYCH_REVISION"):
        return os.environ["DIPTYCH_REVISION"]
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def rows(result: Result) -> list[tuple[str, ...]]:
    """The table's cells, in the order of `HEADER`. What was not measured has no row.

    A small run measures other work, so it is compared with nothing.
    """
    measured: dict[str, float] = dict(result["metrics"])
    known = {} if result["small"] else {metric.key: metric for metric in metrics(result["model"])}
    table = []
    for key, metric in known.items():
        if key in measured:
            ours = measured.pop(key)
            mark = {True: "pass", False: "MISS", None: ""}[metric.meets_target(ours)]
            numbers = (ours, metric.vllm, metric.ratio(ours), metric.target, metric.floor)
            table.append((metric.label, metric.unit, *map(figure, numbers), mark))
    return table + [(key, "", figure(value), "", "", "", "", "") for key, value in measured.items()]


def figure(value: float | None) -> str:
    """Three digits or more, and none that mean nothing."""
    if value is None:
        return ""
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
    return f"{value:,.{digits}f}"


def notes(result: Result) -> list[str]:
    """What a reader of the table must know of how it came about."""
    found = []
    if result["small"]:
        found.append("A small run: it shows that the benchmark works, and measures nothing.")
    if result.get("lengths", "trace") != "trace":
        found.append("Azure lengths were generated, not the trace's: those rows and the online ones compare loosely.")
    if not result["finished"]:
        found.append("The run did not get to its end.")
    found += [f"{part} failed: {text.strip().splitlines()[-1]}" for part, text in result["errors"].items()]
    return found


def origin(result: Result) -> str:
    """Device, software, date, revision and command, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in result["software"].items() if version)
    return f"{result['device']}; {versions}; {result['date']}; revision {result['revision']}; `{result['command']}`"


def start_parts(result: Result) -> str:
    """Where the time of a start went, or nothing."""
    seconds = result["parts"].get("startup", {}).get("seconds_of", {})
    return ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())


def text_table(result: Result) -> str:
    """For a terminal."""
    table = [HEADER, *rows(result)]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADER))]
    lines = ["  ".join(_cells(row, widths)).rstrip() for row in table]
    lines.insert(1, "-" * max(map(len, lines)))
    parts = [f"start, s: {start_parts(result)}"] if start_parts(result) else []
    return "\n".join([f"{result['model']} on {origin(result)}", *lines, *parts, *notes(result)])


def _cells(row: tuple[str, ...], widths: list[int]) -> Iterable[str]:
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.ljust(width) if i < 2 or i == len(row) - 1 else cell.rjust(width)


def markdown_table(result: Result) -> str:
    """For the documentation."""
    lines = [f"| {' | '.join(HEADER)} |", "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in rows(result)]
    return "\n".join(lines)
