"""The files of a user's own policies: of the package that one is in, or its one file, and of what these import."""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from experiments.spec import PoliciesSpec
from policies import registry
from policies.registry import PolicySpec

PROJECT = frozenset({"policies", "simulator", "runtime", "experiments", "dashboard"})


def modules_of(policies: PoliciesSpec) -> Iterator[str]:
    """The modules of a stack's policies that are not this project's, those named inside another one's knobs too."""
    for role in PoliciesSpec.model_fields:
        policy = PolicySpec.parse(getattr(policies, role))
        module = registry.find(role, policy.name).__module__
        if module.partition(".")[0] not in PROJECT:
            yield module
        for value in policy.knobs.values():
            inner, colon, _ = str(value).partition("/")[0].partition(":")
            if colon:
                yield inner


def files_of(module: str) -> list[Path]:
    """Where the code of a module is, in order. Of other packages that are installed there is nothing: like NumPy they
    have versions, which a run's record holds."""
    found: set[Path] = set()
    seen, waiting = set(PROJECT), [(module.partition(".")[0], True)]
    while waiting:
        package, named = waiting.pop()
        if package in seen or package in sys.stdlib_module_names:
            continue
        seen.add(package)
        for path in _sources(package):
            if named or not {"site-packages", "dist-packages"} & set(path.parts):
                found.add(path)
                waiting += [(other, False) for other in _imported(path, path.stat().st_mtime_ns)]
    return sorted(found)


def _sources(package: str) -> Iterator[Path]:
    """All files of a package, or a module's one."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return
    if spec is not None and spec.submodule_search_locations is not None:
        for folder in spec.submodule_search_locations:
            yield from Path(folder).rglob("*.py")
    elif spec is not None and spec.origin is not None and Path(spec.origin).is_file():
        yield Path(spec.origin)


@functools.lru_cache(maxsize=4096)
def _imported(path: Path, changed: int) -> frozenset[str]:
    """The packages that a file imports anywhere in it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # nothing that runs, or compiled
        return frozenset()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            names.add(node.module)
    return frozenset(name.partition(".")[0] for name in names)
