"""A simulation that the page "Try" has started, in a process of its own and in a temporary folder."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import yaml

from experiments.spec import RunSpec

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,79}")
"""What a saved run may be called."""


class Job:
    """Started at once. Its records are in `folder`, outside of the dashboard's root, until `save` copies them there."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self._cancelled = False
        self._home = Path(tempfile.mkdtemp(prefix="diptych-try-"))
        self.folder = self._home / "run"
        about = self._home / "spec.yaml"
        about.write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
        with (self._home / "out").open("wb") as out, (self._home / "err").open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dashboard.worker", str(about), str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
            )
        weakref.finalize(self, _discard, self._process, self._home)

    @property
    def running(self) -> bool:
        """Whether it still simulates."""
        return self._process.poll() is None

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` ended it."""
        return self._cancelled

    @property
    def error(self) -> str:
        """Why it failed, in one line; empty where it did not."""
        if self.running or self.cancelled or self._process.returncode == 0:
            return ""
        lines = (self._home / "err").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with status {self._process.returncode}"

    @property
    def progress(self) -> tuple[int, int]:
        """Requests that have ended, and all of them (0 where that is not known yet)."""
        lines = (self._home / "out").read_text(errors="replace").splitlines()
        words = lines[-1].split() if lines else []
        return (int(words[0]), int(words[1])) if len(words) == 2 else (0, 0)

    def cancel(self) -> None:
        """End it at once. What it had put on disk stays readable, and goes together: parts are written whole."""
        if self.running:
            self._cancelled = True
            self._process.kill()
            self._process.wait()

    def discard(self) -> None:
        """End it and forget its records."""
        _discard(self._process, self._home)

    def save(self, root: Path, name: str) -> Path:
        """Copy its records into a new folder of the root. Raises ValueError for a name that cannot be or is taken."""
        if not NAME.fullmatch(name):
            raise ValueError("a name has letters, digits, spaces, dots, dashes and underscores, 80 at most")
        target = root / name
        if target.exists():
            raise ValueError(f"{name} is there already; choose another name")
        shutil.copytree(self.folder, target)
        return target


def _discard(process: subprocess.Popen[bytes], home: Path) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()
    shutil.rmtree(home, ignore_errors=True)
