"""`diptych published`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from experiments.cli.app import app, console
from experiments.cli.options import make_parent, progress
from experiments.published.keeping import kept_study
from experiments.published.running import NAMES, as_markdown, run_study
from experiments.published.study import Study

MARK = "<!-- below: made by `diptych published --markdown docs/published.md` -->"


@app.command()
def published(
    names: Annotated[list[str] | None, typer.Argument(help=f"Some of {', '.join(NAMES)}; none: all of them.")] = None,
    reduced: Annotated[bool, typer.Option("--reduced", help="The small form, which takes seconds.")] = False,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the verdicts into this page, below its mark; needs all of them.")
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(help="Folder of findings by paper: those made by the same sources are not made again."),
    ] = None,
) -> None:
    """Make published results again, and say whether they come out as published.

    Example: diptych published vtc sarathi --reduced

    What does not hold is said; it is no error. With --keep a run that was stopped goes on after the last whole paper.
    """
    if markdown is not None:
        if names or reduced:
            raise ValueError("--markdown writes the whole page: leave names and --reduced out")
        make_parent(markdown)
    if keep is not None:
        make_parent(keep / "findings")
    studies: list[Study] = []
    with progress("published results", len(names or NAMES)) as bar:
        for name in names or NAMES:
            bar.update(bar.task_ids[0], description=name)
            study, there = (run_study(name, reduced), False) if keep is None else kept_study(name, reduced, keep)
            studies.append(study)
            bar.console.print(_lines(study, ", kept" if there else ""))
            bar.advance(bar.task_ids[0])
    claims = [found for study in studies for found in study.findings]
    console.print(f"{sum(found.holds for found in claims)} of {len(claims)} claims hold")
    if markdown is not None:
        head = (
            markdown.read_text(encoding="utf-8").split(MARK)[0].rstrip() if markdown.exists() else "# Published results"
        )
        markdown.write_text(f"{head}\n\n{MARK}\n\n{as_markdown(studies)}\n", encoding="utf-8")
        console.print(f"Verdicts: {markdown}")


def _lines(study: Study, how: str) -> Text:
    text = Text(f"{study.title} ({study.name}{how})\n", style="bold")
    for found in study.findings:
        mark = ("  holds    ", "green") if found.holds else ("  does not ", "red")
        text.append_text(Text.assemble(mark, (f"{found.claim}: {found.source}\n", "not bold")))
        text.append_text(
            Text(f"             published {found.published}; ours {found.ours}; {found.rule}\n", "not bold")
        )
    return text
