"""What a user gets wrong, and what cannot be served: one line that says what to do."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from experiments.cli.failures import terse_logging
from experiments.records import read_run
from tests.experiments.command import SIMULATE, TINY, diptych
from tests.experiments.fake_run import fake_run

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

HUGE = ["--set", "limits.num_blocks=16777216", "--set", "limits.block_size=1024"]

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
        ([*SIMULATE, "--queue", "sarathi"], ["no queue 'sarathi'; that is a policy for scheduler", "fcfs"]),
        (["simulate", "-w", "chta", "-n", "5"], ["'chta'", "did you mean 'chat'", "sharegpt"]),
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
        (["demo", "--out", "broken.csv"], ["broken.csv cannot be used: File exists"]),
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
        ("run", "missing", "--plots", "new", "--json", "new/c.json"): "missing\n",
        ("run", "rnu"): "there is no folder rnu; did you mean 'run'?\n",
        ("run", "run", "--json", "."): ". is a folder",
        ("run", "run", "--plots", "a-file"): "a-file cannot be used: File exists; give another path",
    }.items():
        status, _, err = diptych(monkeypatch, capsys, "compare", *args)
        assert status == 2
        assert words in err
    assert sorted(os.listdir()) == ["a-file", "run"]


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


def test_what_is_logged_of_an_error_is_one_line_with_its_type_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("runtime.engine")
    with terse_logging():
        logger.warning("no error")
        try:
            raise ValueError("first\nsecond")
        except ValueError:
            logger.exception("request %d", 3)
    assert capsys.readouterr().err == "diptych: no error\ndiptych: request 3: ValueError: first second\n"


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
