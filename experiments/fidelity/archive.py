"""A folder of validation as one file: it goes from a machine that is given back to one that evaluates, or goes on."""

from __future__ import annotations

import tarfile
from pathlib import Path

from experiments.spec import SpecError

SCRATCH = "scratch"


def pack(folder: Path, archive: Path) -> None:
    """All of a folder but for what is unfinished, under its own name; whole or not at all. Not compressed: the records
    are."""
    partial = archive.with_name(archive.name + ".partial")
    with tarfile.open(partial, "w") as tar:
        tar.add(folder, folder.name, filter=_finished)
    partial.replace(archive)


def unpack(archive: Path, parent: Path) -> None:
    """Into `parent`, as the folder that was packed; what is there keeps what the archive lacks. Raises SpecError."""
    try:
        with tarfile.open(archive, "r:") as tar:
            parent.mkdir(parents=True, exist_ok=True)
            tar.extractall(parent, filter="data")
    except (OSError, tarfile.TarError) as error:
        raise SpecError(f"{archive} cannot be unpacked: {error}; give a fidelity.tar that a validation left") from None


def _finished(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    path = Path(member.name)
    return None if SCRATCH in path.parts or path.suffix in (".partial", ".tmp") else member
