"""All published results, one after another, and the table of verdicts."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from experiments.published.study import Study, read_study
from experiments.spec import SpecError

NAMES = ("vllm", "sarathi", "vtc", "fastserve", "mooncake", "distserve", "vidur", "agentix")


def run_study(name: str, reduced: bool = False) -> Study:
    """Run one folder's experiment. Raises SpecError for a name that there is not."""
    if name not in NAMES:
        raise SpecError(f"there is no published result {name!r}; there are {', '.join(NAMES)}")
    study = read_study(name, reduced)
    importlib.import_module(f"experiments.published.{name}").experiment(study)
    return study


def as_markdown(studies: Sequence[Study]) -> str:
    """What docs/published.md has below its head: for each paper what was chosen, and a table of claims."""
    parts = []
    for study in studies:
        rows = [f"## {study.title}", "", f"{study.paper}. `{study.name}`", ""]
        rows += [f"- {choice}" for choice in study.choices]
        rows += ["", "| claim | source | published | ours | rule | verdict |", "| --- | --- | --- | --- | --- | --- |"]
        for found in study.findings:
            cells = (found.claim, found.source, found.published, found.ours, found.rule, verdict(found.holds))
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(rows))
    return "\n\n".join([tally(studies), *parts])


def tally(studies: Sequence[Study]) -> str:
    """How many claims hold, by paper, as a table."""
    rows = ["| paper | claims | hold | do not |", "| --- | ---: | ---: | --- |"]
    for study in studies:
        failed = [found for found in study.findings if not found.holds]
        what = "; ".join(f"{found.claim} ({found.source})" for found in failed) or "-"
        rows.append(f"| {study.title} | {len(study.findings)} | {len(study.findings) - len(failed)} | {what} |")
    return "\n".join(rows)


def verdict(holds: bool) -> str:
    """In words."""
    return "holds" if holds else "**does not hold**"
