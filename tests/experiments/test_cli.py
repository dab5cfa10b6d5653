"""The command line as its user meets it: what it prints, what it leaves, how it fails."""

from __future__ import annotations

import filecmp
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import typer

from experiments.cli.app import app
from experiments.cli.failures import terse_logging
from experiments.cli.options import interruptible
from experiments.demo import Demo, demo_spec
from experiments.profiling import profile
from experiments.records import RunWriter, read_run
from experiments.repeats import is_repeat
from policies.schedulers.mixed import Mixed
from runtime.engine import EngineDead
from runtime.tokenizer import Tokenizer
from tests.experiments.command import diptych
from tests.experiments.fake_run import fake_info, fake_run

SIMULATE = ["simulate", "-w", "chat", "-n", "60", "--rate", "8"]
TINY = ["--model", "tiny", "--set", "model.load_format=dummy", "--set", "limits.num_blocks=64"]
TINY += ["--set", "limits.max_model_len=128", "--set", "workload.length_scale=0.02"]
HUGE = ["--set", "limits.num_blocks=16777216", "--set", "limits.block_size=1024"]


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
        (["simulate", "chat"], ["chat cannot be read", "write -w chat"]),
        (["simulate", "sweep.yaml"], ["sweep.yaml is of a sweep: diptych sweep sweep.yaml"]),
        (["run", "-w", "fixed", "-n", "1", "--set", "model.device=gpu"], ["write cpu, cuda or cuda:1, not 'gpu'"]),
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
        ([*SIMULATE, "--scheduler", "badd:X"], ["badd:X: there is no module 'badd'"]),
        ([*SIMULATE, "--set", "limits.lga=1"], ["limits.lga: unknown field; did you mean 'lag'? known: num_blocks"]),
        ([*SIMULATE, "--set", "limits.num_blocks=yes"], ["limits.num_blocks: Input should be a valid integer"]),
        (["simulate", "-w", "chat", "-n", "5", "--rate", "1e12"], ["workload.rate", "1000000"]),
        (["simulate", "-w", "chat", "-n", "5", "--rate", "1e-9"], ["workload.rate", "0.000001"]),
        (["simulate", "-w", "chat", "-n", "500", "--rate", "1e-6"], ["10,000,000 s", "higher rate"]),
        (["simulate", "-w", "fixed", "-n", "50000", "--rate", "1e-6"], ["e+10 s", "higher rate"]),
        (["run", "-w", "fixed", "-n", "1", "--set", "policies.router=round_robn"], ["did you mean 'round_robin'"]),
        (["run", "-w", "fixed", "-n", "1", "--set", "replicas=3"], ["one replica, not 3", "diptych simulate"]),
        (["run", "-w", "fixed", "-n", "1", *TINY, *HUGE], ["needs 8,192.0 GiB, and cpu has"]),
        (["run", "-w", "fixed", "-n", "1", "--model", "tiny"], ["preset", "--set model.load_format=dummy"]),
        (["policies", "badd:X"], ["badd:X: there is no module 'badd'"]),
    ],
)
def test_a_mistake_gets_one_clear_line_and_a_non_zero_exit(
    args: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.csv").write_text(BROKEN_TRACE)
    Path("broken.yaml").write_text("workload: [\n")
    Path("nan.yaml").write_text("workload: {name: chat, n: 5, rate: .nan}\n")
    Path("sweep.yaml").write_text("base: {workload: {name: fixed, n: 1}}\n")
    Path("broken.gguf").write_bytes(b"GGUF and no more")
    status, _, err = diptych(monkeypatch, capsys, *args)
    assert status == 2
    assert err.strip().count("\n") == 0
    for word in words:
        assert word in err
    assert not Path("runs").exists() or not list(Path("runs").glob("*/requests.parquet"))


def test_compare_makes_no_folder_before_it_has_read_both_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a-file").touch()
    fake_run(Path("run"))
    for args, words in {
        ("run", "missing", "--plots", "new", "--json", "new/c.json"): "missing",
        ("run", "run", "--json", "."): ". is a folder",
        ("run", "run", "--plots", "a-file"): "File exists: 'a-file'",
    }.items():
        status, _, err = diptych(monkeypatch, capsys, "compare", *args)
        assert status == 2
        assert words in err
    assert sorted(os.listdir()) == ["a-file", "run"]


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


@pytest.mark.parametrize(
    ("place", "doing"),
    [
        ("runtime.weights.LlamaModel", "loading the model"),
        ("runtime.executor.PagedKVCache", "starting the engine"),
        ("runtime.executor.DeviceState.send", "warming up"),  # on the engine's own thread
    ],
)
def test_a_card_out_of_memory_is_one_line_that_says_what_to_lower(
    place: str, doing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = MagicMock(side_effect=torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee"))
    monkeypatch.setattr(place, full)
    status, _, err = diptych(monkeypatch, capsys, "run", "-w", "fixed", "-n", "1", *TINY[:-2], "-o", "out")
    assert status == 2
    assert err.strip().count("\n") == 0
    assert f"out of memory while {doing}: lower limits.max_num_batched_tokens, limits.kv_cache_gib or" in err
    for field in ("limits.num_blocks", "limits.capture_sizes", "model.dtype", "model.quantization=fp8", "2.00 GiB."):
        assert field in err
    assert not Path("out").exists()


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
    assert "To cut what is too long: --set workload.max_model_len=128" in err
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
    assert out.count("noise floor") == 2  # a column of the second policy's table, and what it says
    assert is_repeat(read_run("demo/mixed-real"), read_run("demo/mixed-real-again"))
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


@pytest.mark.parametrize("where", ["experiments.cli._run", "experiments.cli.running.make_workload"])
def test_ctrl_c_before_anything_is_recorded_says_just_that(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    assert diptych(monkeypatch, capsys, *SIMULATE) == (130, "", "diptych: interrupted\n")


@pytest.mark.parametrize(
    ("earlier", "recorded", "text"),
    [
        (False, False, "nothing was recorded yet"),
        (False, True, "what was recorded until then is in run"),
        (True, False, "nothing was recorded yet"),
        (True, True, "what was recorded until then is in run"),
    ],
)
def test_ctrl_c_says_where_the_record_is_only_if_this_run_has_one(
    earlier: bool, recorded: bool, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        if recorded:
            RunWriter("run", fake_info(), overwrite=True).abort()
        raise KeyboardInterrupt

    if earlier:
        fake_run(Path("run"))
    with pytest.raises(typer.Exit), interruptible(Path("run")):
        interrupt()
    assert capsys.readouterr().err == f"diptych: interrupted; {text}\n"


def test_what_is_logged_of_an_error_is_one_line_with_its_type_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("runtime.engine")
    with terse_logging():
        logger.warning("no error")
        try:
            raise ValueError("first\nsecond")
        except ValueError:
            logger.exception("request %d", 3)
    assert capsys.readouterr().err == "diptych: no error\ndiptych: request 3: ValueError: first second\n"


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


def test_a_request_that_the_kv_cache_cannot_hold_is_cut_to_what_it_can(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = ["simulate", "-w", "fixed", "-n", "2", "--set", "workload.prompt_tokens=500"]
    small = ["--set", "limits.num_blocks=10", "--set", "limits.max_model_len=4096", "--overwrite"]
    status, _, err = diptych(monkeypatch, capsys, *work, *small)
    assert status == 1
    advice = "--set workload.max_model_len=160"
    assert advice in err
    assert diptych(monkeypatch, capsys, *work, *small, *advice.split())[0] == 0


def test_a_request_that_a_router_turns_down_is_not_to_be_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Path("closed_router.py").write_text(
        "from policies.routers.round_robin import RoundRobin\n"
        "class Closed(RoundRobin):\n"
        "    def route(self, request, keys, replicas, now):\n"
        "        return None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    status, _, err = diptych(monkeypatch, capsys, *SIMULATE, "--replicas", "2", "--router", "closed_router:Closed")
    assert status == 1
    assert "refused by the router" in err
    assert "max_model_len" not in err


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


def test_a_policy_of_the_users_own_is_shown_like_a_built_in_one(
    broken_policies: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = diptych(monkeypatch, capsys, "policies", "broken_policies:Keyless")
    assert status == 0
    assert "scheduler broken_policies:Keyless" in out
    assert "long_prefill_threshold = 0" in out


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
