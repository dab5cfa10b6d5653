"""YAML with the line of every entry, so that an error can say where it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from experiments.spec import SpecError

Place = tuple[str | int, ...]
"""Keys and positions from the document's root on."""


class Lines:
    """Where the entries of a document stand; nowhere, for one that was made in Python."""

    def __init__(self, origin: str, lines: dict[Place, int] | None = None) -> None:
        self.origin = origin
        self._lines = lines or {}

    def at(self, place: Place) -> str:
        """`file:line` of an entry, of the nearest one around it where there is none; without lines the file alone."""
        for length in range(len(place), -1, -1):
            if place[:length] in self._lines:
                return f"{self.origin}:{self._lines[place[:length]]}"
        return self.origin


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """A YAML file that holds a mapping. Raises SpecError, also for a key that stands there twice."""
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                raise SpecError(f"{path} must hold fields by name")
            lines = dict(_places(node, (), str(path)))
            content = loader.construct_document(node)
        finally:
            loader.dispose()
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return content, Lines(str(path), lines)


def _places(node: yaml.Node, place: Place, path: str) -> Iterator[tuple[Place, int]]:
    yield place, node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            yield from _places(item, (*place, position), path)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise SpecError(f"{path}:{line}: {'.'.join(map(str, (*place, name)))} stands here a second time")
            seen.add(name)
            yield from _places(value, (*place, name), path)
            yield (*place, name), line
