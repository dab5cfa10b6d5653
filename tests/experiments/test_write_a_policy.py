"""docs/write-a-policy.md as its reader meets it: the file, the commands, the installed package."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.divergence import diff_decisions
from experiments.records import read_run
from tests.experiments.command import diptych

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "write-a-policy.md").read_text()
EXAMPLE = ROOT / "examples" / "aged-shortest"
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.fixture(autouse=True)
def _in_a_folder_with_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aged_shortest.py").write_text((EXAMPLE / "aged_shortest.py").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_the_pages_policy_is_the_example_and_short() -> None:
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code is not None
    assert code.group(1) == (EXAMPLE / "aged_shortest.py").read_text()
    assert len(code.group(1).splitlines()) < 40
    entry = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert entry is not None
    assert entry.group(1) in (EXAMPLE / "pyproject.toml").read_text()


def test_the_pages_commands_simulate_and_compare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With fewer requests than the page has."""
    commands = [c for c in COMMANDS if c.startswith(("diptych policies", "diptych simulate", "diptych compare"))]
    commands = [c for c in commands if "--calibration" not in c and "runs/real" not in c]  # tests/test_docs_run.py
    assert len(commands) == 4
    for command in commands:
        args = shlex.split(command.replace("-n 5000", "-n 600"))
        status, out, err = diptych(monkeypatch, capsys, *args[1:])
        assert status == 0, err
    assert "TTFT" in out
    for run in ("fcfs", "aged"):
        assert len(read_run(Path("runs", run)).requests) == 600


def test_the_pages_commands_run_and_replay_without_divergence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With random weights of a tiny model instead of the page's."""
    tiny = "--model tiny --set model.load_format=dummy --set limits.num_blocks=24 --set limits.max_model_len=128"
    (run,) = [c for c in COMMANDS if c.startswith("diptych run")]
    (replay,) = [c for c in COMMANDS if c.startswith("diptych replay")]
    run = run.replace("length_scale=0.1", "length_scale=0.02").replace("--rate 1", "--rate 100")
    for command in (f"{run} {tiny}", replay):
        status, _, err = diptych(monkeypatch, capsys, *shlex.split(command)[1:])
        assert status == 0, err
    real = read_run(Path("runs", "real"))
    assert real.info["stack"]["queue"] == "aged_shortest:AgedShortest"
    (replayed,) = [path for path in Path("runs").iterdir() if path.name not in ("real",)]
    assert diff_decisions(real, read_run(replayed)) is None


def test_without_weight_on_work_it_decides_as_first_come_first_served(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["simulate", "-w", "chat", "-n", "300", "--rate", "100", "--set", "limits.num_blocks=700"]
    small += ["--set", "limits.max_model_len=8192"]
    for queue, out in (("fcfs", "a"), ("aged_shortest:AgedShortest,ms_per_token=0", "b")):
        assert diptych(monkeypatch, capsys, *small, "--queue", queue, "-o", out)[0] == 0
    assert diff_decisions(read_run(Path("a")), read_run(Path("b"))) is None
    assert diptych(monkeypatch, capsys, *small, "--queue", "aged_shortest:AgedShortest", "-o", "c")[0] == 0
    assert diff_decisions(read_run(Path("a")), read_run(Path("c"))) is not None


@pytest.mark.slow
def test_the_package_installs_and_its_policy_goes_by_name(tmp_path: Path) -> None:
    """Into a folder of its own: pip builds it, and the entry point is found."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    source = tmp_path / "source"
    source.mkdir()
    for file in ("pyproject.toml", "aged_shortest.py"):
        (source / file).write_text((EXAMPLE / file).read_text())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(source)]
    subprocess.run(pip, check=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    for args, wanted in (
        (["policies"], "aged_shortest"),
        (["policies", "aged_shortest"], "ms_per_token"),
        (["simulate", "-w", "chat", "-n", "50", "--rate", "8", "--queue", "aged_shortest,ms_per_token=2"], "TTFT"),
    ):
        command = [sys.executable, "-c", "from experiments.cli import main; main()", *args]
        done = subprocess.run(command, env=environment, cwd=elsewhere, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert wanted in done.stdout
