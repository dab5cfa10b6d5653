"""The documentation's commands and code, run as they stand there, on less: fewer requests, a tiny model.

What is not run here is named with where it runs instead.
"""

from __future__ import annotations

import gzip
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.workloads import WorkloadSpec, make_workload
from experiments.workloads.converting import write
from tests.experiments.command import diptych
from tests.test_docs import PAGES, ROOT, blocks

ELSEWHERE = {
    "diptych serve": "tests/runtime/serving",
    "diptych engine": "tests/runtime/serving",
    "diptych bench": "tests/experiments/test_bench.py",
    "diptych dashboard": "tests/dashboard",
    "diptych published": "tests/experiments/test_published.py",
    "diptych --version": "tests/experiments/test_cli.py",
    "make ": "the suite itself, and cards",
    "python -m benchmarks.": "tests/experiments, and by hand",
    "python3 -m venv": "whoever installs",
    "source ": "whoever installs",
    "pip install": "whoever installs",
    "curl ": "tests/runtime/serving",
    "export ": "tests/runtime/serving",
    "torchrun ": "tests/runtime/parallel",
}
NOT_HERE = re.compile(r"model\.device=cuda|--ray |--base-url|--panel both|runs/trace runs/closed")
"""Cards, a cluster, a server and what was measured at one, real runs of a search."""
MODULE_OF = {"README": "mine", "contract": "gentle", "write-a-policy": "aged_shortest"}
"""What a page calls the file of its policy."""
TINY = "--model tiny --set model.load_format=dummy --set limits.num_blocks=64 --set limits.max_model_len=256"
SHORT = "--set workload.length_scale=0.05 --set workload.max_input=200"
LESS = (
    (r"-n \d+", "-n 24"),
    (r"--seeds 3", "--seeds 1 --probes 4"),
    (r"--seconds \d+", "--seconds 4"),
    (r"--host-memory [\d.]+", "--host-memory 0.01"),
    (r"--disk [\d.]+", "--disk 0.02"),
)
LESS_IN_REAL = ((r"--rate [\d.]+", "--rate 30"), (r"-n \d+", "-n 6"), (r"think_s=[\d.]+", "think_s=0.01"))
LESS_IN_FILES = (
    (r"n: 300", "n: 12"),
    (r"n: 2000", "n: 40"),
    (r"seeds: 5", "seeds: 2"),
    (r"trials: 40", "trials: 4"),
    (r"8, 12]", "8]"),
)


def lines_of(page: Path) -> list[str]:
    """The commands of a page, each on one line."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in text.splitlines())
    return [" ".join(line.split()) for line in lines if line and not line.startswith(("#", "for ", "done", "-d "))]


def less(command: str) -> str:
    for pattern, by in LESS:
        command = re.sub(pattern, by, command)
    if command.startswith("diptych run "):
        for pattern, by in LESS_IN_REAL:
            command = re.sub(pattern, by, command)
        command = re.sub(r"--model \S+|--set (model|limits)\.\S+|--set workload\.length_scale=\S+", "", command)
        command += f" {TINY} {SHORT}"
    if command.startswith("diptych profile "):
        command += f" {TINY}"
    return command.removesuffix("&").replace("$seed", "1").replace("/tmp/kv", "kv")


def write_files(page: Path) -> None:
    """What the page's commands read: its own files, and those that its reader has."""
    if page.stem in MODULE_OF:
        Path(f"{MODULE_OF[page.stem]}.py").write_text(blocks(page, "python")[0])
    for block in blocks(page, "yaml"):
        named = re.match(r"# (\S+\.yaml)", block)
        for pattern, by in LESS_IN_FILES:
            block = re.sub(pattern, by, block)
        Path(named[1] if named else "specification.yaml").write_text(block)
    Path("examples").symlink_to(ROOT / "examples")
    workload = make_workload(WorkloadSpec(name="prefix-chat", n=30, rate=2, seed=1))
    write(workload, "conversation_trace.jsonl.gz", "mooncake")
    write(workload, "chat.jsonl", "diptych")
    rows = [f"{i},client-{i % 5},{20 + i},{10 + i},{100.0 * i}" for i in range(100)]
    Path("day.csv").write_text("\n".join(["req_id,adapter_dir,prompt_len,output_len,req_time", *rows]) + "\n")
    rows = [f"2023-11-16 18:{i:02}:00.0000000,{100 + i},{10 + i}" for i in range(20)]
    Path("code.csv").write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    calibrations = sorted(ROOT.glob("benchmarks/results/fidelity/qwen3-0.6b/calibrations/*.json*"))
    if page.stem == "fidelity":
        packed = calibrations[0].read_bytes()
        Path("calibration.json").write_bytes(gzip.decompress(packed) if packed[:2] == b"\x1f\x8b" else packed)


def before(page: Path) -> list[str]:
    """Commands of other pages whose runs this one's figures are of."""
    if page.stem != "traces":
        return []
    runs = [f"simulate -w chat -n 24 --rate 8 --scheduler {s} -o runs/chat-{s}-sim" for s in ("mixed", "sarathi")]
    base = {"workload": {"name": "chat", "n": 12, "rate": 8}, "decisions": False}
    for name, fields in {
        "rates": {"workload.rate": [4, 8]},
        "policies": {"policies.scheduler": ["mixed", "sarathi"]},
        "chunks": {
            "policies.scheduler": ["sarathi"],
            "policies.scheduler.chunk_size": [64, 128],
            "workload.rate": [4, 8],
        },
    }.items():
        Path(f"{name}.yaml").write_text(json.dumps({"base": base, "variables": {"grid": fields}}))
        runs.append(f"sweep {name}.yaml -o sweeps/{name} --processes 1")
    real = f"run -w chat -n 6 --rate 30 -o runs/chat-mixed-real {TINY} {SHORT}"
    return [f"diptych {command}" for command in (*runs, real)]


@pytest.mark.parametrize("page", [page for page in PAGES if lines_of(page)], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_files(page)
    own = ["diptych simulate specification.yaml"] if Path("specification.yaml").exists() else []
    for command in [*before(page), *lines_of(page), *own]:
        if command.startswith(tuple(ELSEWHERE)) or NOT_HERE.search(command):
            continue
        assert command.startswith("diptych "), f"{page.name} has a command that is run nowhere: {command}"
        status, out, err = diptych(monkeypatch, capsys, *shlex.split(less(command))[1:])
        assert status == ("requests were refused" in err), f"{command}: {err or out}"
    monkeypatch.delitem(sys.modules, MODULE_OF.get(page.stem, ""), raising=False)


SCRIPTS = [(page, block) for page in PAGES if page.stem not in MODULE_OF for block in blocks(page, "python")]


@pytest.mark.parametrize(("page", "script"), SCRIPTS, ids=[page.stem for page, _ in SCRIPTS])
def test_the_scripts_of_a_page_run(page: Path, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a process of its own, as its reader would."""
    monkeypatch.chdir(tmp_path)
    write_files(page)
    base = {"workload": {"name": "chat", "n": 12, "rate": 4}, "decisions": False}
    script = script.replace("{...}", repr(base))
    if "SmolLM2" in script:
        from runtime.weights import default_model

        if default_model.kept() is None:
            pytest.skip("the default model is not here")
    Path("script.py").write_text(script)
    ran = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr
