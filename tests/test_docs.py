"""The documentation: every command in it is one that the command line takes, every block of Python runs or at least
compiles with imports that exist, and the site builds strictly, so no link in it is dead."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from experiments.cli import load_commands
from experiments.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def _commands(page: Path) -> list[str]:
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.startswith("diptych ")]


COMMANDS = [pytest.param(command, id=f"{page.stem}: {command[:60]}") for page in PAGES for command in _commands(page)]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_is_one_that_the_command_line_takes(command: str) -> None:
    """Its name and its flags; values are checked as far as their types go."""
    load_commands()
    group: Any = typer.main.get_command(app)
    name, *args = shlex.split(command, comments=True)[1:]
    if "&" in args:
        args = args[: args.index("&")]
    if name == "--version":
        return
    assert name in group.commands
    taken = group.commands[name]
    taken.parse_args(taken.context_class(taken, info_name=name), args)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_compiles_and_imports_what_there_is(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.split(".")[0] in ("policies", "runtime", "simulator", "experiments")
            ):
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{node.module} has no {missing}"


def test_the_site_builds_without_a_dead_link_and_every_page_is_in_its_menu(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    assert "not included in the" not in built.stderr
    assert (tmp_path / "command-line" / "index.html").read_text().count("<h2") > 10
