"""The command line as its user meets it: what it prints, what it leaves, how it fails."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import cli
from experiments.cli.app import app
from experiments.records import read_run

SIMULATE = ["simulate", "-w", "chat", "-n", "60", "--rate", "8"]
TINY = ["--model", "tiny", "--set", "model.load_format=dummy", "--set", "limits.num_blocks=64"]
TINY += ["--set", "limits.max_model_len=128", "--set", "workload.length_scale=0.02"]


def diptych(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command, in this process."""
    monkeypatch.setattr(sys, "argv", ["diptych", *args])
    status = 0
    try:
        cli.main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


BROKEN_TRACE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.1,x,9\n"
)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([*SIMULATE, "--scheduler", "mixd"], ["mixd", "did you mean 'mixed'"]),
        ([*SIMULATE, "--scheduler", "mixed,chunk=3"], ["no knob 'chunk'"]),
        ([*SIMULATE, "--scheduler", "nowhere.module:Mine"], ["nowhere.module"]),
        ([*SIMULATE, "--queue", "sjf,predictor=psychic"], ["psychic", "declared"]),
        (["simulate", "-w", "chat", "-n", "5", "--rate", "nan"], ["workload.rate", "nan"]),
        (["simulate", "-w", "chat", "-n", "0", "--rate", "1"], ["workload.n", "0"]),
        (["simulate", "-w", "broken.csv"], ["broken.csv:3", "x"]),
        (["simulate", "-w", "missing.csv"], ["missing.csv"]),
        (["simulate"], ["--workload"]),
        (["simulate", "missing.yaml"], ["missing.yaml"]),
        (["simulate", "broken.yaml"], ["broken.yaml"]),
        (["simulate", "nan.yaml"], ["nan.yaml", "workload.rate"]),
        ([*SIMULATE, "--set", "limits.lagg=1"], ["limits.lagg"]),
        ([*SIMULATE, "--set", "limits"], ["FIELD=VALUE"]),
        ([*SIMULATE, "--device", "abacus"], ["abacus", "h100-sxm"]),
        ([*SIMULATE, "--calibration", "missing.json"], ["missing.json"]),
        (["run", "-w", "fixed", "-n", "1", "--model", "missing.gguf"], ["missing.gguf"]),
        (["run", "-w", "fixed", "-n", "1", "--model", "broken.gguf"], ["broken.gguf"]),
        (["run", "-w", "fixed", "-n", "1", "--set", "target=both"], ["'both' needs cost"]),
        ([*SIMULATE, "--calibration", "c.json", "--device", "l4"], ["leave --model and --device out"]),
        (["compare", "missing", "other"], ["missing"]),
        (["replay", "missing"], ["missing"]),
        (["policies", "sarrathi"], ["did you mean 'sarathi'"]),
        (["dashboard", "missing"], ["missing", "diptych demo"]),
    ],
)
def test_a_mistake_gets_one_clear_line_and_a_non_zero_exit(
    args: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.csv").write_text(BROKEN_TRACE)
    Path("broken.yaml").write_text("workload: [\n")
    Path("nan.yaml").write_text("workload: {name: chat, n: 5, rate: .nan}\n")
    Path("broken.gguf").write_bytes(b"GGUF and no more")
    status, _, err = diptych(monkeypatch, capsys, *args)
    assert status == 2
    assert err.strip().count("\n") == 0
    for word in words:
        assert word in err
    assert not Path("runs").exists() or not list(Path("runs").glob("*/requests.parquet"))


def test_every_command_shows_an_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        status, out, _ = diptych(monkeypatch, capsys, name, "--help")
        assert status == 0
        assert f"Example: diptych {name}" in out


def test_the_same_seed_simulates_to_the_same_files_byte_for_byte(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("a", "b", "c"):
        seed = "7" if folder == "c" else "3"
        extra = ["--seed", seed, "-o", folder, "--replicas", "2", "--set", "limits.num_blocks=400"]
        status, out, _ = diptych(monkeypatch, capsys, *SIMULATE, *extra)
        assert status == 0
        assert "TTFT" in out
    files = ["run.json", "requests.parquet", "steps.parquet", "decisions.parquet"]
    assert sorted(os.listdir("a")) == sorted(files)
    assert filecmp.cmpfiles("a", "b", files, shallow=False) == (files, [], [])
    assert "requests.parquet" in filecmp.cmpfiles("a", "c", files, shallow=False)[1]


def test_a_run_is_not_overwritten_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert diptych(monkeypatch, capsys, *SIMULATE)[0] == 0
    status, _, err = diptych(monkeypatch, capsys, *SIMULATE)
    assert status == 2
    assert "chat-mixed-sim" in err
    assert diptych(monkeypatch, capsys, *SIMULATE, "--overwrite")[0] == 0


def test_a_specification_runs_in_both_panels_and_its_real_run_replays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("both.yaml").write_text(
        "target: both\n"
        "workload: {name: fixed, n: 6, rate: 50, prompt_tokens: 20, output_tokens: 5}\n"
        "policies: {scheduler: {name: sarathi, chunk_size: 32}, queue: sjf}\n"
        "model: {source: tiny, load_format: dummy}\n"
        "limits: {num_blocks: 64, max_model_len: 128}\n"
        "cost: {kind: constant, step_ms: 2}\n"
    )
    status, out, err = diptych(monkeypatch, capsys, "run", "both.yaml", "-o", "run")
    assert (status, err) == (0, "")
    assert "simulated" in out
    assert read_run("run/real").limits == read_run("run/sim").limits
    status, out, _ = diptych(monkeypatch, capsys, "replay", "run/real")
    assert status == 0
    assert "Zero divergences" in out
    status, out, _ = diptych(
        monkeypatch, capsys, "compare", "run/real", "run/sim", "--json", "c.json", "--plots", "plots"
    )
    assert status == 0
    assert json.loads(Path("c.json").read_text())["matched"] == 6
    assert list(Path("plots").glob("*.png"))
    assert list(Path("plots").glob("*.svg"))


@pytest.mark.parametrize("command", ["run", "simulate"])
def test_requests_that_can_never_be_served_are_said_and_the_others_are_served(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mixed.jsonl").write_text(
        '{"timestamp": 0, "input_length": 20, "output_length": 4, "hash_ids": [1]}\n'
        '{"timestamp": 1, "input_length": 500, "output_length": 4, "hash_ids": [2]}\n'
        '{"timestamp": 2, "input_length": 30, "output_length": 4, "hash_ids": [3]}\n'
    )
    extra = TINY[:-2] if command == "run" else ["--set", "limits.max_model_len=128"]
    status, _, err = diptych(monkeypatch, capsys, command, "-w", "mixed.jsonl", *extra, "-o", "out")
    assert status == 1
    assert "1 of 3 requests were refused" in err
    assert "500" in err
    assert "128" in err
    assert err.strip().count("\n") == 0
    assert sorted(read_run("out").requests["status"]) == ["length", "length", "refused"]


@pytest.mark.parametrize("command", ["run", "simulate"])
def test_ctrl_c_leaves_a_readable_record_and_no_process_behind(command: str) -> None:
    sizes = ["--set", "workload.prompt_tokens=20", "--set", "workload.output_tokens=100"]
    long = {
        # Longer than the pauses between them, so that some are always being served.
        "run": ["run", "-w", "fixed", "-n", "5000", "--rate", "50", *TINY[:-2], *sizes],
        "simulate": ["simulate", "-w", "chat", "-n", "200000", "--rate", "8"],
    }
    process = subprocess.Popen(
        [sys.executable, "-c", "from experiments.cli import main; main()", *long[command], "-o", "cut"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(Path("cut/parts").glob("requests-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; what was recorded until then is in cut" in err
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    run = read_run("cut")
    assert not run.complete
    statuses = set(run.requests["status"])
    assert "unfinished" in statuses
    assert statuses & {"stop", "length"}
    assert len(run.steps) > 10


def test_a_measured_machine_is_simulated_with_the_limits_it_was_measured_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ["--set", "limits.max_num_seqs=4", "--set", "limits.lag=1"]
    status, out, err = diptych(monkeypatch, capsys, "profile", "--seconds", "4", *TINY[:-2], *limits, "-o", "c.json")
    assert (status, err) == (0, "")
    assert "Error on held-out steps" in out
    work = ["-w", "chat", "-n", "40", "--rate", "20", "--set", "workload.length_scale=0.02"]
    status, out, err = diptych(monkeypatch, capsys, "simulate", "--calibration", "c.json", *work, "-o", "sim")
    assert (status, err) == (0, "")
    run = read_run("sim")
    assert (run.limits["num_blocks"], run.limits["max_num_seqs"], run.limits["lag"]) == (64, 4, 1)
    assert run.limits["max_model_len"] == 128


def test_the_demo_shows_both_panels_under_two_policies_and_replays_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--dummy", "--model", "tiny", "--profile-seconds", "4", "--seconds", "2"]
    status, out, err = diptych(monkeypatch, capsys, "demo", *quick)
    assert (status, err) == (0, "")
    assert out.count("decision replay: zero divergences") == 2
    assert "diptych dashboard demo" in out
    for policy in ("static", "mixed"):
        for panel in ("real", "sim", "replay"):
            assert read_run(f"demo/{policy}-{panel}").complete
        assert list(Path(f"demo/{policy}-plots").glob("*.png"))


def test_policies_are_listed_by_role_and_shown_with_their_knobs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = diptych(monkeypatch, capsys, "policies")
    for word in ("scheduler", "mixed", "queue", "sjf", "eviction", "lru", "router", "least_tokens"):
        assert word in out
    _, out, _ = diptych(monkeypatch, capsys, "policies", "sarathi")
    assert "chunk_size = 512" in out
    assert "OSDI 2024" in out


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
