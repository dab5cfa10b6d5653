"""What makes two cells the same: what they run, the content of the files it names, and the code that runs it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.spec import RunSpec, SpecError
from experiments.sweeps.plug_ins import files_of, modules_of

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"sim": ("policies", "simulator", "experiments"), "real": ("policies", "runtime", "experiments")}
"""Panel -> the code that its results come from."""
ELSEWHERE = tuple(
    ROOT / "experiments" / name for name in ("bench", "capacity", "cli", "fidelity", "live", "published", "tuning")
)
"""Folders of experiments/ that no cell runs."""


FILES = ("name", "calibration", "device")
"""Fields that may name a file: a trace, a calibration, a device; in a pool of a cluster, too."""


def digest(value: Any) -> str:
    """SHA-256 of JSON values, the same whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def cell_key(spec: RunSpec, panel: str, like: str | None) -> str:
    """Of what a cell runs. `like`: the key of the real run that a simulation takes its limits from.

    What has its default value counts as not given: a field that is new since does not make a cell another one.
    """
    pools = [[pool.name, pool.role, _described(spec.of_pool(i))] for i, pool in enumerate(spec.pools)]
    described = {"run": _described(spec), "pools": pools}
    files = dict(sorted(_files(spec.model_dump(mode="json"))))
    return digest({"spec": described, "panel": panel, "files": files, "like": like})


def _described(spec: RunSpec) -> dict[str, Any]:
    """A run, but for its pools."""
    described = spec.model_dump(mode="json", exclude={"target", "pools"}, exclude_defaults=True)
    if spec.cost is not None and spec.cost.kind == "fitted":  # the calibration's limits, where none are given
        described["limits"] = spec.limits.model_dump(mode="json", exclude_unset=True)
    return described


def _files(described: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """The files that a specification names, with their contents' digests; of a model its name alone."""
    if isinstance(described, dict):
        for name, value in described.items():
            yield from _files(value, name)
    elif isinstance(described, list):
        for value in described:
            yield from _files(value)
    elif field in FILES and isinstance(described, str) and (path := Path(described)).is_file():
        yield described, _content(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _content(path: Path, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_key(panel: str, spec: RunSpec) -> str:
    """Of this project's code for a panel, and of a user's own policies."""
    stacks = [spec.policies, *(spec.of_pool(i).policies for i in range(len(spec.pools)))]
    modules = sorted({module for stack in stacks for module in modules_of(stack)})
    if "__main__" in modules:
        raise SpecError("a sweep's policies are imported by its processes: put them into a module, not into the script")
    own = [[path.name, _content(path, path.stat().st_mtime_ns)] for module in modules for path in files_of(module)]
    return digest([_project(panel), own])


@functools.cache
def _project(panel: str) -> str:
    files = [path for room in ROOMS[panel] for path in (ROOT / room).rglob("*.py")]
    contents = hashlib.sha256()
    for path in sorted(path for path in files if not set(path.parents) & set(ELSEWHERE)):
        contents.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return contents.hexdigest()
