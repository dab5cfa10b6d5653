"""The command line as its user meets it: what it prints and what it leaves."""

from __future__ import annotations

import filecmp
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.cli.app import app
from experiments.compare import compare
from experiments.records import read_run
from experiments.repeats import is_repeat
from tests.experiments.command import SIMULATE, TINY, diptych

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_every_command_shows_an_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert diptych(monkeypatch, capsys, "--help")[0] == 0
    assert len(app.registered_commands) == 17
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__.replace("_", "-")
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
    assert "runs/chat-mixed-sim holds a run already; name another folder (-o NAME)" in err
    assert "--overwrite" in err
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


def test_run_says_what_the_parts_of_its_start_took_and_serves_in_fp8(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = ["workload.prompt_tokens=20", "workload.output_tokens=5"]
    fields += ["model.dtype=bfloat16", "model.quantization=fp8", "model.kv_cache_dtype=fp8"]
    settings = [word for field in fields for word in ("--set", field)]
    status, out, err = diptych(monkeypatch, capsys, "run", "-w", "fixed", "-n", "2", *TINY[:-2], *settings, "-o", "out")
    assert (status, err) == (0, "")
    assert re.search(r"started in [\d.]+ s: load [\d.]+, memory profile [\d.]+, warm up [\d.]+, kv cache [\d.]+", out)
    recorded = read_run("out").info["spec"]["model"]
    assert (recorded["quantization"], recorded["kv_cache_dtype"]) == ("fp8", "fp8")


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
    assert out.count("noise floor") == 2  # a column of the second policy's table, and what it says
    assert is_repeat(read_run("demo/mixed-real"), read_run("demo/mixed-real-again"))
    assert "diptych dashboard demo" in out
    medians = [[read_run(f"demo/{p}-{panel}") for p in ("static", "mixed")] for panel in ("real", "sim")]
    for panel, (static, mixed) in zip(("served", "simulated"), medians, strict=True):
        change = compare(static, mixed).latencies["ttft"]["p50"].error
        assert change is not None
        assert f"{panel}, TTFT p50 {change:+.0%} and E2E p50 " in out
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


@pytest.mark.parametrize("name", ["s[bold]x", "s[/x]", "s:x:1", "k=1", "long-" * 30])
def test_a_folder_of_any_name_is_written_read_and_shown_as_it_is_called(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = diptych(monkeypatch, capsys, *SIMULATE, "-o", name)
    assert (status, err) == (0, "")
    assert f"Records: {name}\n" in out
    assert f"{Path(name).name} (sim)" in out
    monkeypatch.chdir(name)
    status, out, err = diptych(monkeypatch, capsys, "replay", ".")
    assert (status, err) == (0, "")
    monkeypatch.chdir(Path.cwd().parent)
    status, out, err = diptych(
        monkeypatch, capsys, "compare", Path(name).name, f"{Path(name).name}-replay", "--json", "some/where/c.json"
    )
    assert (status, err) == (0, "")
    assert f"{Path(name).name} (sim)  against  {Path(name).name}-replay (replay)" in out
    assert json.loads(Path("some/where/c.json").read_text())["matched"] == 60


def test_a_simulation_says_what_it_is_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = diptych(monkeypatch, capsys, *SIMULATE, "--model", "SmolLM2-135M-Instruct", "--device", "l4")
    assert "chat-mixed-sim (sim): smollm2-135m in bfloat16 on l4" in out
    constant = ["--set", "cost.kind=constant", "--set", "cost.step_ms=2.5", "--set", "limits.num_blocks=4000"]
    _, out, _ = diptych(monkeypatch, capsys, *SIMULATE, *constant, "-o", "constant")
    assert "constant (sim): every step 2.5 ms" in out


def test_a_kind_of_cost_in_a_flag_replaces_another_kind_in_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("s.yaml").write_text("workload: {name: chat, n: 5}\ncost: {model: qwen3-0.6b, device: l4}\n")
    status, _, err = diptych(monkeypatch, capsys, "simulate", "s.yaml", "--calibration", "missing.json")
    assert status == 2
    assert "missing.json" in err
    assert "roofline" not in err
    status, out, _ = diptych(monkeypatch, capsys, "simulate", "s.yaml", "--device", "h200")
    assert status == 0
    assert "qwen3-0.6b in bfloat16 on h200" in out


def test_the_version_says_revision_python_torch_and_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = diptych(monkeypatch, capsys, "--version")
    assert (status, err) == (0, "")
    device = r"NVIDIA .*" if torch.cuda.is_available() else "cpu: .+"
    versions = rf"Python 3\.\d+\.\d+, torch {re.escape(torch.__version__)}"
    assert re.fullmatch(rf"diptych \d+\.\d+\.\d+, revision \S+, {versions}, device {device}\n", out)


def test_the_command_line_begins_without_what_is_slow_to_import() -> None:
    script = (
        "import sys; from experiments.cli import load_commands; load_commands(); "
        "print(*{name.split('.')[0] for name in sys.modules} & {'torch', 'scipy', 'matplotlib', 'streamlit', 'optuna'})"
    )
    begun = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert begun.stdout.split() == []
