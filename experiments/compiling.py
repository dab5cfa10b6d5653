"""The same code compiled: `python -m experiments.compiling FOLDER` copies the packages there and compiles the parts of
the simulator and the control plane that every step goes through, with mypyc, from the types that they have.

Decisions and records are those of the interpreted code. Nothing is compiled in place: who wants it names the folder,
`PYTHONPATH=FOLDER diptych simulate ...`, and whoever changes a file compiles again. Policies stay interpreted.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from experiments.records.environment import REVISION, git_revision

MODULES = (
    *("policies/block_pool.py", "policies/coasting.py", "policies/control_plane.py", "policies/decode_group.py"),
    *("policies/decoding.py", "policies/draft.py", "policies/enactment.py", "policies/loop.py", "policies/plan.py"),
    *("policies/recording.py", "policies/repeating.py", "policies/replica_state.py", "policies/request.py"),
    *("policies/shapes.py", "simulator/cluster.py", "simulator/endings.py", "simulator/fed.py", "simulator/member.py"),
    *("simulator/pace.py", "simulator/replica.py", "simulator/simulation.py"),
)
"""What is compiled: no module with a class that policies or tests derive from."""

_PACKAGES = ("policies", "runtime", "simulator", "experiments", "dashboard", "benchmarks")
_BUILD = """
import sys
from mypyc.build import mypycify
from setuptools import setup

modules = mypycify(["--config-file", sys.argv[1], *sys.argv[2:]], opt_level="2", debug_level="0")
setup(name="diptych-compiled", packages=[], ext_modules=modules, script_args=["-q", "build_ext", "--inplace"])
"""


def compile_into(folder: Path) -> None:
    """Copy the packages into a folder, anew, and compile `MODULES` there.

    Raises RuntimeError where the folder holds anything else than an earlier copy, and with what the compiler said where
    it fails.
    """
    root = Path(__file__).resolve().parents[1]
    if folder.resolve() == root or (folder.exists() and any(folder.iterdir()) and not (folder / REVISION).is_file()):
        raise RuntimeError(f"{folder} holds other things, which would be overwritten; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REVISION).write_text(git_revision() or "", encoding="utf-8")  # first: it says that all here is a copy
    for package in _PACKAGES:
        if (root / package).is_dir():
            shutil.rmtree(folder / package, ignore_errors=True)
            shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    command = [sys.executable, "-c", _BUILD, str(root / "pyproject.toml"), *MODULES]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the code could not be compiled:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the copy, such as build/compiled")
    folder: Path = parser.parse_args().folder
    try:
        compile_into(folder)
    except RuntimeError as error:
        sys.exit(str(error))
    print(f"Compiled into {folder}. To use it: PYTHONPATH={folder.resolve()} diptych ...")


if __name__ == "__main__":
    main()
