"""A published result made again: its specification, what was found, and whether that is what was published."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from experiments.records import Run, read_run
from experiments.simulated import run_simulated
from experiments.spec import RunSpec, SpecError, check_spec
from experiments.workloads import Workload

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Finding:
    """One claim of a paper beside ours. `rule`: what ours has to be for the claim to hold."""

    claim: str
    source: str
    published: str
    ours: str
    rule: str
    holds: bool


@dataclass
class Study:
    """One folder's `spec.yaml`, and the findings of its experiment.

    The file has the `title` and `paper`, `choices` (what was chosen where the paper leaves it open or cannot be
    followed), `run` (the fields of a run), `values` (what the experiment varies) and `reduced` (what of `run` and
    `values` is otherwise in the reduced form).
    """

    name: str
    title: str
    paper: str
    choices: list[str]
    run: dict[str, Any]
    values: dict[str, Any]
    reduced: bool
    findings: list[Finding] = field(default_factory=list)

    def spec(self, over: Mapping[str, Any] | None = None) -> RunSpec:
        """The run's specification with some fields otherwise. Raises SpecError."""
        return check_spec(
            merged({"target": "sim", "decisions": False, **self.run}, over or {}), f"{self.name}/spec.yaml"
        )

    def simulate(self, over: Mapping[str, Any] | None = None, workload: Workload | None = None) -> Run:
        """Simulate it, and give the records, which are read whole: no file is left."""
        with tempfile.TemporaryDirectory(prefix="diptych-published-") as folder:
            run_simulated(self.spec(over), Path(folder) / "run", workload=workload)
            run = read_run(Path(folder) / "run")
            _ = run.requests, run.steps  # read now
        return run

    def find(self, claim: str, source: str, published: str, ours: str, rule: str, holds: bool) -> None:
        """Add a finding."""
        self.findings.append(Finding(claim, source, published, ours, rule, bool(holds)))


def read_study(name: str, reduced: bool) -> Study:
    """The specification of a folder. Raises SpecError."""
    path = FOLDER / name / "spec.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {"title", "paper", "choices", "run", "values", "reduced"}
    if unknown := sorted(set(content) - known):
        raise SpecError(f"{name}/spec.yaml: unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}")
    less = content.get("reduced") or {} if reduced else {}
    run = merged(content.get("run") or {}, less.get("run") or {})
    values = merged(content.get("values") or {}, less.get("values") or {})
    return Study(name, content["title"], content["paper"], content["choices"], run, values, reduced)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries, the second winning; what is None there is left out."""
    result = dict(base)
    for key, value in over.items():
        if value is None:
            result.pop(key, None)
            continue
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return result
