"""Rules for the tree as a whole: no file is too long to be read at once, and no function to be seen at once."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_OF_A_FILE, MOST_OF_A_FUNCTION = 500, 80
REASON = "Long for "
"""What a docstring gives as the reason of more, as in "Long for its arguments"."""


def too_long(file: str, text: str) -> list[str]:
    """The file, if it has too many lines, and its functions that do, without a reason in their docstrings."""
    tree, found = ast.parse(text), []
    if len(text.splitlines()) > MOST_OF_A_FILE and REASON not in (ast.get_docstring(tree) or ""):
        found.append(f"{file}: {len(text.splitlines())} lines")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > MOST_OF_A_FUNCTION and REASON not in (ast.get_docstring(node) or ""):
                found.append(f"{file}:{node.lineno}: {node.name} has {lines} lines")
    return found


def test_no_file_has_over_500_lines_and_no_function_over_80_without_a_reason_at_it() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("only git knows which files are the project's")
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [file for file in listed.stdout.splitlines() if (ROOT / file).exists()]
    assert len(files) > 500
    assert [fault for file in files for fault in too_long(file, (ROOT / file).read_text())] == []


def test_a_line_too_many_is_found_and_a_reason_excuses_it() -> None:
    body = "    x = 1\n"
    assert too_long("a.py", "def f():\n" + body * 79) == []
    assert too_long("a.py", "def f():\n" + body * 80) == ["a.py:1: f has 81 lines"]
    assert too_long("a.py", "class A:\n  async def f():\n" + body * 80) == ["a.py:2: f has 81 lines"]
    assert too_long("a.py", 'def f():\n    """Does.\n\n    Long for its table.\n    """\n' + body * 80) == []
    assert too_long("a.py", "x = 1\n" * 500) == []
    assert too_long("a.py", "x = 1\n" * 501) == ["a.py: 501 lines"]
    assert too_long("a.py", '"""Long for a table."""\n' + "x = 1\n" * 500) == []
