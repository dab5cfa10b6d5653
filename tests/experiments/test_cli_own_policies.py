"""Policies of a user's own on the command line, and how they fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from experiments.demo import Demo, demo_spec
from experiments.profiling import profile
from experiments.records import read_run
from policies.schedulers.mixed import Mixed
from runtime.engine import EngineDead
from runtime.tokenizer import Tokenizer
from tests.experiments.command import SIMULATE, TINY, diptych

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_a_policy_of_the_users_own_runs_in_both_panels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Path("own_policy.py").write_text(
        "from policies.key_queue import KeyQueue\n"
        "class Longest(KeyQueue):\n"
        '    """Longest prompt first."""\n'
        "    def rank(self, request):\n"
        "        return -request.num_prompt_tokens\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    status, _, err = diptych(monkeypatch, capsys, *SIMULATE, "--queue", "own_policy:Longest")
    assert (status, err) == (0, "")
    status, _, err = diptych(
        monkeypatch, capsys, "run", "-w", "chat", "-n", "5", "--rate", "50", *TINY, "--queue", "own_policy:Longest"
    )
    assert (status, err) == (0, "")
    assert read_run("runs/chat-mixed-real").info["stack"]["queue"] == "own_policy:Longest"


BROKEN_POLICIES = """
from policies.schedulers.mixed import Mixed
class Keyless(Mixed):
    def plan(self, view, now):
        return {}["x"]
class Valueless(Mixed):
    def plan(self, view, now):
        return int("seven")
class Stopped(Mixed):
    def plan(self, view, now):
        raise RuntimeError("out of ideas")
class Idle(Mixed):
    def plan(self, view, now):
        return view.draft().finish()
class Unmade(Mixed):
    def __init__(self, queue):
        super().__init__(queue, None, None, None)
class Chained(Mixed):
    def plan(self, view, now):
        import pandas
        return pandas.Series({"a": 1})["x"]
"""


@pytest.fixture
def broken_policies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A module of the user's in the current folder."""
    Path("broken_policies.py").write_text(BROKEN_POLICIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("broken_policies", None)


@pytest.mark.parametrize("command", ["run", "simulate"])
@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("Keyless", "KeyError: 'x'", "broken_policies.py:5, in plan"),
        ("Valueless", "invalid literal for int() with base 10: 'seven'", "broken_policies.py:8, in plan"),
        ("Stopped", "out of ideas", "broken_policies.py:11, in plan"),
        ("Idle", "planned nothing", "control_plane.py:"),
        ("Unmade", "TypeError: ", "broken_policies.py:17, in __init__"),
        ("Chained", "KeyError: 'x'", "broken_policies.py:21, in plan"),
    ],
)
def test_what_a_policy_raises_ends_in_one_line_that_names_its_file_and_line(
    command: str,
    name: str,
    text: str,
    where: str,
    broken_policies: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    extra = TINY if command == "run" else []
    args = [command, "-w", "chat", "-n", "5", "--rate", "50", *extra, "--scheduler", f"broken_policies:{name}"]
    status, _, err = diptych(monkeypatch, capsys, *args)
    assert status == 2
    assert err.startswith("diptych: ")
    assert err.strip().count("\n") == 0
    assert text in err
    assert f"({where}" in err
    assert "diptych --traceback ... shows the whole)" in err


def test_a_dead_engine_is_told_of_once(broken_policies: None) -> None:
    args = ["run", "-w", "chat", "-n", "5", *TINY, "--scheduler", "broken_policies:Keyless"]
    command = [sys.executable, "-c", "from experiments.cli import main; main()", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if line.startswith("diptych:")]  # a library may warn beside us
    assert told == [
        "diptych: the engine has stopped: KeyError: 'x' "
        "(broken_policies.py:5, in plan; diptych --traceback ... shows the whole)"
    ]


@pytest.mark.parametrize("first", [True, False])
def test_the_traceback_is_shown_wherever_it_is_asked_for(
    first: bool, broken_policies: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*SIMULATE, "--scheduler", "broken_policies:Keyless"]
    with pytest.raises(KeyError):
        diptych(monkeypatch, capsys, *(["--traceback", *args] if first else [*args, "--traceback"]))


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine dies of its first plan."""

    def plan(self: Mixed, view: object, now: int) -> None:
        raise RuntimeError("out of ideas")

    monkeypatch.setattr(Mixed, "plan", plan)


def test_an_engine_that_dies_while_it_is_measured_is_noticed(dying: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.real.warm_up", lambda *args: None)
    with pytest.raises(EngineDead, match="out of ideas"):
        profile(demo_spec("tiny", "dummy"), seconds=1e-9)


def test_an_engine_that_dies_of_the_demos_question_is_noticed(dying: None) -> None:
    tokenizer: Any = MagicMock(spec=Tokenizer, special_ids=frozenset())
    tokenizer.encode.return_value = [1, 2, 3]
    show = Demo(Path("demo"), "tiny", "dummy")
    with pytest.raises(EngineDead, match="out of ideas"):
        show.ask(replace(show.load(), tokenizer=tokenizer, chat_template="any"), "Why?")


def test_a_policy_of_the_users_own_is_shown_like_a_built_in_one(
    broken_policies: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = diptych(monkeypatch, capsys, "policies", "broken_policies:Keyless")
    assert status == 0
    assert "scheduler broken_policies:Keyless" in out
    assert "long_prefill_threshold = 0" in out
