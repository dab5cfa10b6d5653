"""A specification as the command that gives it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any

from experiments.spec import RunSpec

_FLAGS = {
    "workload.name": "--workload",
    "workload.n": "-n",
    "workload.rate": "--rate",
    "cost.model": "--model",
    "cost.device": "--device",
    "replicas": "--replicas",
    **{
        f"policies.{role}": f"--{role}"
        for role in ("scheduler", "queue", "admission", "preemption", "eviction", "offload", "router", "autoscaler")
    },
}
"""Fields that have a flag of their own in `diptych simulate`; the others are given by --set."""


def simulate_command(spec: RunSpec, folder: str | None = None) -> list[str]:
    """The words of the `diptych simulate` that gives this specification: what is as by default is left out."""
    words = ["diptych", "simulate"]
    given = spec.model_dump(mode="json", exclude={"target", "model"}, exclude_defaults=True)
    seeds = (spec.workload.seed, spec.seed)
    if seeds[0] == seeds[1] != 0:
        words += ["--seed", str(seeds[0])]
    for field, value in _leaves(given):
        if field in ("seed", "workload.seed") and seeds[0] == seeds[1]:
            continue
        flag = _FLAGS.get(field)
        if flag is not None:
            words += [flag, str(value)]
        elif field != "cost.kind":  # a roofline, which the flags ask for
            words += ["--set", f"{field}={value if isinstance(value, str) else json.dumps(value)}"]
    return words if folder is None else [*words, "-o", folder]


def as_text(words: list[str]) -> str:
    """For a shell, one pair a line."""
    quoted = [shlex.quote(word) for word in words]
    lines, line = [], " ".join(quoted[:2])
    for word in quoted[2:]:
        if word.startswith("-") and len(line) > 72:
            lines.append(line)
            line = "   "
        line += f" {word}"
    return " \\\n".join([*lines, line])


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if not path and name in ("workload", "policies", "limits", "cost"):
            yield from _leaves(value, f"{name}.")
        else:
            yield path + name, value
