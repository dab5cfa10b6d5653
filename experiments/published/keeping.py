"""Findings kept in a folder, one file a paper, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.published.running import run_study
from experiments.published.study import Finding, Study, read_study

ROOT = Path(__file__).parents[2]
ROOMS = ("policies", "simulator", "experiments")


def kept_study(name: str, reduced: bool, folder: Path) -> tuple[Study, bool]:
    """The findings that the folder has of the same sources, traces and form, else those of a run, kept there then.

    Gives whether they were there. Raises SpecError for a name that there is not.
    """
    path, of = folder / f"{name}.json", sources(reduced)
    kept = _read(path)
    if kept.get("of") == of:
        study = read_study(name, reduced)
        study.findings = [Finding(**found) for found in kept["findings"]]
        return study, True
    study = run_study(name, reduced)
    unfinished = path.with_suffix(".unfinished")
    content = {"of": of, "findings": [asdict(found) for found in study.findings]}
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return study, False


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) and "findings" in content else {}
    except (OSError, ValueError):
        return {}  # what cannot be read is made again


def sources(reduced: bool) -> str:
    """A digest of all that the findings may hang on: the code and specifications, the traces' folder, the form."""
    digest = hashlib.sha256(f"{reduced} {os.environ.get('DIPTYCH_TRACES', '')}".encode())
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in (".py", ".yaml", ".jsonl"):
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
