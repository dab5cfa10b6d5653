"""Puts results into the documentation: `python -m benchmarks.gpu.report [RESULTS...] [--doc docs/performance.md]`.

RESULTS are files of `benchmarks.gpu.serving` or folders of them; without any, the folder where it writes. Of several
results of one model, the figures of the later ones take the place of the earlier ones'.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.gpu.results import Result, markdown_table, notes, origin, out_folder, read, start_parts

BEGIN = "<!-- begin: written by benchmarks.gpu.report -->"
END = "<!-- end: written by benchmarks.gpu.report -->"


def find(paths: list[Path]) -> list[Path]:
    """The result files that are meant. Small runs are left out, unless named."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.glob("gpu-serving-*.json") if not p.stem.endswith("-small"))
        else:
            found.append(path)
    return found


def section(results: list[Result]) -> str:
    """What is known of one model."""
    merged: Result = {**results[-1], "metrics": {}, "errors": {}, "parts": {}}
    for result in results:
        merged["metrics"].update(result["metrics"])
        merged["parts"].update(result["parts"])
        merged["errors"].update(result["errors"])
    lines = [f"### {merged['model']}", "", markdown_table(merged), ""]
    if start_parts(merged):
        lines += [f"Start, in seconds: {start_parts(merged)}.", ""]
    lines += [line for note in notes(merged) for line in (note, "")]
    lines += [line for result in results for line in (f"Measured on: {origin(result)}. {settings(result)}", "")]
    return "\n".join(lines)


def settings(result: Result) -> str:
    """The scheduler and the step budget of each work, and what somebody has noted of the result."""
    given = result.get("settings", {})
    known = [f"{name}: {json.dumps(given[name])}." for name in ("scheduler", "max_num_batched_tokens") if name in given]
    return " ".join([*known, *([result["note"]] if "note" in result else [])])


def generated(results: list[Result]) -> str:
    """All that stands between the markers."""
    by_model: dict[str, list[Result]] = {}
    for result in results:
        by_model.setdefault(result["model"], []).append(result)
    return "\n".join(section(group) for group in by_model.values())


def insert(document: str, text: str) -> str:
    """The document with `text` between its markers. Raises ValueError where they are missing."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument("--doc", type=Path, default=Path("docs/performance.md"))
    options = parser.parse_args()
    files = find(options.results or [out_folder()])
    if not files:
        sys.exit("no results; run python -m benchmarks.gpu.serving first")
    text = generated([read(path) for path in files])
    options.doc.write_text(insert(options.doc.read_text(), text))
    print(f"{len(files)} results into {options.doc}")


if __name__ == "__main__":
    main()
