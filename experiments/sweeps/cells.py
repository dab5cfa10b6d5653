"""From a sweep's file, or the same as a dictionary, to its cells: every run, resolved and checked."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from experiments.spec import PoliciesSpec, RunSpec, SpecError, first_error
from experiments.sweeps.identity import cell_key
from experiments.sweeps.spec import SEED_FIELDS, Panel, SweepSpec
from experiments.sweeps.yaml_lines import Lines, read_yaml
from policies import registry
from policies.registry import PolicyError, PolicySpec

NAME_LENGTH = 60


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: of its folder; it says what is varied, and ends in a part of the key.
        values: what is varied, field -> value.
        seed: None where the sweep has no seeds.
        panel: `real` or `sim`.
        spec: the whole run.
        key: digest of what it runs (`identity.cell_key`).
        like: name of the real cell whose limits a simulation takes over, where both panels run.
    """

    name: str
    values: dict[str, Any]
    seed: int | None
    panel: Panel
    spec: RunSpec
    key: str
    like: str | None = None


@dataclass(frozen=True)
class Sweep:
    """A sweep that can be run: `content` is what was given, with the base in it."""

    spec: SweepSpec
    content: dict[str, Any]
    cells: list[Cell]


def read_sweep(source: str | Path | Mapping[str, Any]) -> Sweep:
    """A sweep from a YAML file or from a dictionary of the same fields. Raises SpecError with file, line and field."""
    if isinstance(source, Mapping):
        content, lines, folder = copy.deepcopy(dict(source)), Lines("the sweep"), Path()
    else:
        content, lines = read_yaml(Path(source))
        folder = Path(source).parent
    spec = checked(SweepSpec, content, lines)
    base, base_lines, prefix = read_base(content["base"], lines, folder)
    expansion = _Expansion(spec, base, lines, base_lines, prefix)
    return Sweep(spec, {**content, "base": base}, list(expansion.cells()))


def read_base(base: dict[str, Any] | str, lines: Lines, folder: Path) -> tuple[dict[str, Any], Lines, tuple[str, ...]]:
    """The run that is varied: its fields, and where they stand. A file's path is as seen from `folder`."""
    if not isinstance(base, str):
        return base, lines, ("base",)
    path = folder / base
    if not path.is_file():
        raise SpecError(f"{lines.at(('base',))}: base: there is no file {path}; name one, or give a run's fields")
    return *read_yaml(path), ()


def checked(model: Any, content: Mapping[str, Any], lines: Lines) -> Any:
    """`content` as a specification of this kind. Raises SpecError with line and field."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        errors = error.errors()
        # Of what may be one thing or another, a name that nobody knows says most.
        first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
        message = first["msg"].removeprefix("Value error, ")
        place = tuple(part for part in first["loc"] if "[" not in str(part))  # nor is it said which of them it is
        if first["type"] == "extra_forbidden":
            known = _fields_at(model, place[:-1])
            near = registry.nearest(str(place[-1]), known)
            message = f"unknown field; {near}" + (f"known: {', '.join(known)}" if known else "leave it out")
        elif first["type"] not in ("missing", "value_error") and not isinstance(
            first.get("input"), dict | list | tuple
        ):
            message += f", not {first.get('input')!r}"
        field = ".".join(map(str, place))
        raise SpecError(f"{lines.at(place)}: {field + ': ' if field else ''}{message}") from None


def _fields_at(model: Any, place: tuple[str | int, ...]) -> list[str]:
    for name in place:
        model = getattr(model, "model_fields", {}).get(name)
        model = None if model is None else model.annotation
    return list(getattr(model, "model_fields", ()))


class _Expansion:
    """The combinations of a sweep's variables, each with its place in the file for what is wrong with it."""

    def __init__(
        self, spec: SweepSpec, base: dict[str, Any], lines: Lines, base_lines: Lines, prefix: tuple[str, ...]
    ) -> None:
        self._spec = spec
        self._base = base
        self._lines = lines
        self._base_lines = base_lines
        self._prefix = prefix
        target = base.get("target", "sim")
        self._panel = spec.panel or target

    def cells(self) -> Iterator[Cell]:
        """In the order of the table: the first variable changes slowest, then the seeds, then the panels."""
        seen: set[str] = set()
        for chosen in self._combinations():
            for seed in self._spec.variables.seeds or (None,):
                real: Cell | None = None
                for panel in ("real", "sim") if self._panel == "both" else (self._panel,):
                    cell = self._cell(chosen, seed, panel, real)
                    if cell.name in seen:
                        raise SpecError(f"{self._lines.at(('variables',))}: two cells are the same run: {cell.name}")
                    seen.add(cell.name)
                    real = cell if panel == "real" else real
                    yield cell

    def _combinations(self) -> Iterator[dict[str, tuple[int, Any]]]:
        """Field -> (position of the value in its list, value)."""
        variables = self._spec.variables
        axes: list[list[dict[str, tuple[int, Any]]]] = [
            [{field: (i, value)} for i, value in enumerate(values)] for field, values in variables.grid.items()
        ]
        for group in variables.zip:
            length = len(next(iter(group.values())))
            axes.append([{field: (i, values[i]) for field, values in group.items()} for i in range(length)])
        for combination in itertools.product(*axes):
            yield {field: value for part in combination for field, value in part.items()}

    def _cell(self, chosen: dict[str, tuple[int, Any]], seed: int | None, panel: Any, real: Cell | None) -> Cell:
        content = copy.deepcopy(self._base)
        content["target"] = self._panel
        for field, (at, value) in sorted(chosen.items(), key=lambda item: item[0].count(".")):
            try:
                put(content, field, value)
            except (SpecError, PolicyError) as error:
                raise SpecError(f"{self._place(field, at)}: {error}") from None
        for field in SEED_FIELDS if seed is not None else ():
            put(content, field, seed)
        try:
            spec = RunSpec.model_validate(content)
        except ValidationError as error:
            raise SpecError(self._what_is_wrong(error, chosen)) from None
        self._check_knobs(spec, chosen)
        spec = spec.model_copy(update={"target": panel})
        key = cell_key(spec, panel, real.key if real else None)
        values = {field: value for field, (_, value) in chosen.items()}
        name = f"{_slug(values, seed, panel if self._panel == 'both' else None)}-{key[:8]}".lstrip("-")
        return Cell(name, values, seed, panel, spec, key, real.name if real else None)

    def _what_is_wrong(self, error: ValidationError, chosen: dict[str, tuple[int, Any]]) -> str:
        loc = error.errors()[0]["loc"]
        dotted = ".".join(map(str, loc))
        message = first_error(error)
        blamed = [
            field for field in chosen if f"{dotted}.".startswith(f"{field}.") or f"{field}.".startswith(f"{dotted}.")
        ]
        if dotted and blamed:
            field = max(blamed, key=len)
            return f"{self._place(field, chosen[field][0])}: {message}"
        where = self._base_lines.at((*self._prefix, *loc))
        values = ", ".join(f"{field}={_text(value)}" for field, (_, value) in chosen.items())
        return f"{where}: {message}" + (f" (in the cell {values})" if values and not dotted else "")

    def _check_knobs(self, spec: RunSpec, chosen: dict[str, tuple[int, Any]]) -> None:
        self._check_stack(spec.policies, ("policies",), chosen)
        for i in range(len(spec.pools)):
            self._check_stack(spec.of_pool(i).policies, ("pools", i, "policies"), chosen)

    def _check_stack(
        self, policies: PoliciesSpec, group: tuple[str | int, ...], chosen: dict[str, tuple[int, Any]]
    ) -> None:
        for role in PoliciesSpec.model_fields:
            policy = PolicySpec.parse(getattr(policies, role))
            known = sorted(set(registry.knobs(registry.find(role, policy.name))) - set(registry.CONTEXT))
            for knob in policy.knobs:
                if knob not in known:
                    of_role = ".".join(map(str, (*group, role)))
                    field = f"{of_role}.{knob}"
                    near = registry.nearest(str(knob), known)
                    message = f"{field}: {policy.name} has no such knob; {near}it has {', '.join(known) or 'none'}"
                    fields = [name for name in (field, of_role) if name in chosen]
                    where = (
                        self._place(fields[0], chosen[fields[0]][0])
                        if fields
                        else self._base_lines.at((*self._prefix, *group, role))
                    )
                    raise SpecError(f"{where}: {message}")

    def _place(self, field: str, at: int) -> str:
        places = [(*place, at) for place in self._spec.variables.places(field)]
        found = [self._lines.at(place) for place in places]
        return found[-1] if found else self._lines.origin


def put(content: dict[str, Any], field: str, value: Any) -> None:
    """Set a dotted field of a specification, as limits.lag or pools.0.replicas; below a policy's role it is a knob's.
    Raises SpecError, PolicyError."""
    *path, last = field.split(".")
    if len(path) in (2, 4) and path[-2] == "policies" and path[-1] in PoliciesSpec.model_fields:
        *group, role = path
        policies = _inside(content, group, field)
        of_run = (content.get("policies") or {}).get(role)  # which a pool has where it says nothing
        policy = PolicySpec.parse(policies.get(role) or of_run or PoliciesSpec.model_fields[role].default)
        policies[role] = {"name": policy.name, **policy.knobs, last: value}
        return
    inner = _inside(content, path, field)
    inner[_index(inner, last, field) if isinstance(inner, list) else last] = copy.deepcopy(value)


def _inside(content: dict[str, Any], path: list[str], field: str) -> Any:
    """The group, or the list, at a path; groups that are not there are made."""
    inner: Any = content
    for depth, part in enumerate(path, 1):
        if isinstance(inner, list):
            inner = inner[_index(inner, part, field)]
        else:
            if inner.get(part) is None:
                inner[part] = [] if part == "pools" else {}
            inner = inner[part]
        if not isinstance(inner, dict | list):
            raise SpecError(f"{field}: {'.'.join(path[:depth])} is no group of fields")
    return inner


def _index(items: list[Any], text: str, field: str) -> int:
    if not text.isdecimal() or int(text) >= len(items):
        known = ", ".join(map(str, range(len(items))))
        hint = f"give its place: {known}" if known else "give the run some first"
        raise SpecError(f"{field}: there is no entry {text!r} in a list of {len(items)}; {hint}")
    return int(text)


def _text(value: Any) -> str:
    if isinstance(value, Mapping) and "name" in value:
        return ",".join([str(value["name"]), *(f"{knob}={of}" for knob, of in value.items() if knob != "name")])
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _slug(values: Mapping[str, Any], seed: int | None, panel: str | None) -> str:
    """What is varied, short enough for a folder's name."""
    parts = []
    for field, value in values.items():
        text = Path(value).name.split(".")[0] if isinstance(value, str) and "/" in value else _text(value)
        named = isinstance(value, str | Mapping)
        parts.append(text if named else f"{field.rsplit('.', 1)[-1]}={text}")
    parts += [] if seed is None else [f"seed={seed}"]
    parts += [] if panel is None else [panel]
    return re.sub(r"[^\w=.+,-]+", "_", "-".join(parts))[:NAME_LENGTH].strip("-")
