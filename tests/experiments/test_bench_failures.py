"""`diptych bench` where something goes wrong: the server, the flags, or the user stops it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from experiments.bench.spec import check_bench
from experiments.metrics import summarize
from experiments.records import read_run
from experiments.spec import SpecError
from tests.experiments.benching import (
    CHAT,
    COMPLETIONS,
    RANDOM_IDS,
    SMALL,
    bench,
    model_server,
    no_model,
    steady,
)
from tests.openai_server import (
    DONE,
    Answer,
    FakeServer,
    Seen,
    event,
    serving,
    text_chunk,
)

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

REPO = Path(__file__).resolve().parents[2]


async def misbehaving(seen: Seen, answer: Answer) -> None:
    """Every kind of failure, by the prompt's first token, and an answer for the others."""
    match seen.body["prompt"][0] % 8:
        case 0:
            await answer.whole(503, {"error": {"message": "queue is full"}}, Retry_After="1")
        case 1:
            await answer.whole(400, {"error": {"message": "too long"}})
        case 2:
            await answer.whole(500, b"oh no")
        case 3:
            await answer.hang_up()
        case 4:
            await answer.start()
            await answer.write(text_chunk("a"))
            await asyncio.sleep(0.02)
            await answer.hang_up()
        case 5:
            await answer.start()
            await answer.write(text_chunk("a"), event({"error": {"message": "engine died"}}), DONE)
            await answer.end()
        case 6:
            await answer.start()
            await answer.write(text_chunk("a"))
            await asyncio.sleep(3)
        case _:
            await steady(seen, answer)


def test_every_failure_is_counted_and_listed_and_none_is_lost_or_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--warm-up", "0", "--timeout", "0.8", "--rate", "200", *RANDOM_IDS]
    with serving(model_server(misbehaving)) as server:
        status, out, err = bench(monkeypatch, capsys, server.url, *SMALL, "-n", "80", *flags)
    kinds = Counter(body["prompt"][0] % 8 for body in server.bodies(COMPLETIONS))
    assert set(kinds) == set(range(8))
    assert sum(kinds.values()) == 80
    run = read_run("run")
    summary = summarize(run)
    assert status == 1
    assert summary["completed"] == summary["statuses"]["length"] == kinds[7]
    assert summary["statuses"]["refused"] == kinds[0] + kinds[1]
    assert summary["statuses"]["failed"] == kinds[2] + kinds[3] + kinds[4] + kinds[5] + kinds[6]
    errors = Counter(run.requests["error"])
    assert errors["HTTP 503: queue is full"] == kinds[0]
    assert errors["HTTP 500: oh no"] == kinds[2]
    assert errors["the server ended the stream with an error: engine died"] == kinds[5]
    assert sum(count for error, count in errors.items() if re.match(r".*(silent|within 0.8 s)", error)) == kinds[6]
    assert f"{80 - kinds[7]} of 80 requests failed" in err
    assert err.count(" x ") == 5
    assert summary["failed"] == 80 - kinds[7]
    assert f"{kinds[7]} length" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-m", "x", *RANDOM_IDS], "a warm-up request failed: HTTP 404: The model `x` does not exist."),
        ([], "the server was asked for its models: HTTP 404"),
        (["-m", "x"], "give --tokenizer FOLDER, or --vocab-size N"),
        (["-m", "x", "--concurrency", "2"], "leave --rate and --speed-up out"),
        (["-m", "x", "--api", "chat", "--prompts", "ids"], "the chat API takes no token ids"),
        (["-m", "x", "--api", "embeddings"], "api: Input should be 'completions' or 'chat'"),
        (["-m", "x", "--set", "limits.lag=0"], "the server has its own"),
        (["-m", "x", "--goodput", "itl:3"], "no objective 'itl'"),
        (["-m", "x", "--goodput", "ttft"], "as ttft:200"),
        (["-m", "x", "--extra-body", "[1]"], "write a JSON object"),
        (["-m", "x", "--tokenizer", "nowhere"], "nowhere has no tokenizer.json"),
    ],
)
def test_what_cannot_work_is_said_in_one_line_before_a_run_folder_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    with serving(no_model) as server:
        status, _, err = bench(monkeypatch, capsys, server.url, *SMALL, "-n", "2", "--rate", "9", *flags)
    assert status == 2
    assert said in err
    assert err.count("\n") == 1
    assert not Path("run").exists()


def test_nobody_at_the_address_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(no_model) as server:
        url = server.url
    status, _, err = bench(monkeypatch, capsys, url, *SMALL, "-n", "2", "--rate", "9")
    assert status == 2
    assert re.fullmatch(r"diptych: the server was asked for its models: http://\S+ cannot be reached: .*\n", err)


def test_a_server_that_is_just_starting_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def starting(seen: Seen, answer: Answer) -> None:
        asked.append(seen.path)
        if len(asked) < 3:
            await answer.whole(503, b"loading")
        else:
            await model_server(steady)(seen, answer)

    asked: list[str] = []
    flags = ["-n", "2", "--rate", "90", "--goodput", "ttft:5000", *RANDOM_IDS]
    with serving(starting) as server:
        status, _, err = bench(monkeypatch, capsys, server.url, *SMALL, *flags)
        assert status == 2
        assert "asked for its models: HTTP 503: loading" in err
        status, out, _ = bench(monkeypatch, capsys, server.url, *SMALL, *flags, "--wait", "20")
    assert status == 0
    assert asked[:3] == ["/v1/models"] * 3
    assert re.search(r"Goodput: [\d.]+ requests/s met every objective", out)


def test_ctrl_c_keeps_what_was_measured() -> None:
    async def slow(seen: Seen, answer: Answer) -> None:
        await answer.start()
        for _ in range(100 if seen.body["prompt"][0] % 2 else 2):
            await answer.write(text_chunk("a"), gap_s=0.05)
        await answer.write(text_chunk("b", "stop"), DONE)
        await answer.end()

    with serving(model_server(slow)) as server:
        command = [sys.executable, "-c", "from experiments.cli import main; main()", "bench", "--base-url", server.url]
        command += [*SMALL, "-n", "4000", "--rate", "40", "--warm-up", "0", *RANDOM_IDS, "-o", "run"]
        command += ["--save-result", "result.json"]
        environment = {**os.environ, "PYTHONPATH": str(REPO)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        _wait_for(server, 60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; what was measured until then is in run" in err
    assert "Traceback" not in err
    assert "unfinished" in out
    run = read_run("run")
    statuses = Counter(run.requests["status"])
    assert not run.complete
    assert statuses["stop"] > 0
    assert statuses["unfinished"] > 0
    # Of those that were on their way to the server just then, it need not have read the body.
    read, sent = len(server.bodies(COMPLETIONS)), sum(statuses.values())
    assert read <= sent <= read + statuses["unfinished"]
    result = json.loads(Path("result.json").read_text())
    assert (result["completed"], result["num_prompts"]) == (statuses["stop"], sum(statuses.values()))


def _wait_for(server: FakeServer, requests: int) -> None:
    deadline = time.monotonic() + 60
    while len(server.bodies(COMPLETIONS)) < requests:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_specification_names_the_field_that_is_wrong() -> None:
    workload: dict[str, Any] = {"name": "fixed", "n": 1}
    with pytest.raises(SpecError, match="base_url: 'localhost' is no server's address"):
        check_bench(base_url="localhost", model="m", workload=workload)
    with pytest.raises(SpecError, match="vocab_size is for random token ids"):
        check_bench(base_url="http://h", model="m", workload=workload, api="chat", vocab_size=9)
    spec = check_bench(base_url="http://h/v1/", model="m", workload=workload, api="chat")
    assert (spec.base_url, spec.prompts, spec.path) == ("http://h", "text", CHAT)
