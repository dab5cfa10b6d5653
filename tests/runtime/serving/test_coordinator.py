"""Several replicas behind one address: spread by a router, killed, drained, restarted, and nobody is left hanging."""

from __future__ import annotations

import asyncio
import collections
import json
import os
import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from experiments.records import read_run
from tests.runtime.serving.disconnecting import Client
from tests.runtime.serving.running import OPERATOR, PATIENCE, Running, running, wait_until

LIMITS = {"num_blocks": 128, "max_num_seqs": 4, "max_model_len": 512}
LONG = {"prompt": [5] * 20, "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def pair(model_folder: Path) -> Iterator[Running]:
    with running(model_folder, "--replicas", "2", "--router", "least_tokens", "--check", **LIMITS) as started:
        yield started


def _steps(server: Running) -> list[int]:
    return [engine["steps"]["count"] for engine in server.info()["engines"]]


def test_replicas_share_the_work_and_an_operator_has_a_say(pair: Running) -> None:
    clients = [Client(pair, {**LONG, "max_tokens": 30, "seed": i}) for i in range(12)]
    answers = [client.json()["choices"][0]["text"] for client in clients]
    assert all(count > 20 for count in _steps(pair))
    alone = [pair.http.post("/v1/completions", json={**LONG, "max_tokens": 30, "seed": i}).json() for i in range(4)]
    assert [answer["choices"][0]["text"] for answer in alone] == answers[:4]  # whoever serves it
    assert pair.metric("vllm:request_success_total") == 16
    assert pair.metric("diptych:engine_up") == 2

    swapped = pair.operate("/admin/policies", {"scheduler": "sarathi,chunk_size=64", "router": "round_robin"})
    assert [answer["stack"]["scheduler"] for answer in swapped["replicas"]] == ["sarathi,chunk_size=64"] * 2
    assert pair.info()["router"] == "round_robin"

    pair.operate("/admin/replicas/0/drain")
    before = _steps(pair)
    for _ in range(3):
        assert pair.http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2}).status_code == 200
    assert _steps(pair)[0] == before[0]
    pair.operate("/admin/replicas/1/drain")
    refused = pair.http.post("/v1/completions", json={"prompt": "Hello"})
    assert refused.status_code == 503
    assert "every replica is being drained" in refused.text
    assert refused.headers["Retry-After"] == "5"
    pair.operate("/admin/replicas/0/undrain")
    assert pair.metric("diptych:engine_up") == 1  # 1 is still being drained
    assert pair.http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2}).status_code == 200
    assert pair.http.post("/admin/replicas/7/drain", headers=OPERATOR).status_code == 404
    pair.operate("/admin/replicas/1/undrain")
    assert (
        pair.http.post("/v1/completions", json={"prompt": ["a", "b", "c"], "max_tokens": 2, "n": 2}).status_code == 200
    )


def test_when_a_replica_is_killed_what_was_not_begun_goes_elsewhere_and_streams_end_with_an_error(
    pair: Running,
) -> None:
    """The pair's last test: it leaves both dead."""
    pair.operate("/admin/policies", {"router": "least_tokens"})
    begun = [Client(pair, {**LONG, "stream": True}) for _ in range(8)]
    for client in begun:
        assert b"200 OK" in client.read_some()
    waiting = [Client(pair, {**LONG, "max_tokens": 5}) for _ in range(12)]
    wait_until(lambda: pair.info()["queued"] >= 10, "both replicas have requests that wait")
    victim = pair.engine(1)
    victim.kill()
    assert [client.status() for client in waiting] == [200] * 12
    rests = [client.everything() for client in begun]
    lost = [rest for rest in rests if b"the engine process was killed by signal 9" in rest]
    assert len(lost) == 4  # those of one replica
    assert all(rest.rstrip(b"\r\n0").endswith(b"data: [DONE]") for rest in rests)
    assert pair.http.get("/health").status_code == 200
    assert [engine["state"] for engine in pair.info()["engines"]] == ["serving", "dead"]
    assert pair.operate("/admin/replicas/1/restart") == {"replica": 1}
    assert [engine["state"] for engine in pair.info()["engines"]] == ["serving", "serving"]
    assert pair.info()["live"] == 0
    pair.engine(0).kill()
    wait_until(lambda: pair.info()["engines"][0]["state"] == "dead", "it is known")
    assert pair.http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2}).status_code == 200
    pair.engine(1).kill()
    wait_until(lambda: pair.http.get("/health").status_code == 503, "nobody is left")
    assert "every replica is dead" in pair.http.post("/v1/completions", json={"prompt": "Hello"}).text


def test_restarted_and_joined_replicas_do_as_the_others_and_overwrite_no_record(
    model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with running(model_folder, "--replicas", "2", "-o", str(folder), **LIMITS) as server:
        server.operate("/admin/policies", {"scheduler": "sarathi,chunk_size=64"})
        server.operate("/admin/pause")
        paths = ["/admin/replicas/1/restart", "/admin/replicas/1/restart", "/admin/replicas", "/admin/replicas"]
        with ThreadPoolExecutor(len(paths)) as pool:
            answers = list(pool.map(server.operate, paths))
        assert answers[:2] == [{"replica": 1}] * 2
        assert sorted(answer["replica"] for answer in answers[2:]) == [2, 3]
        engines = server.info()["engines"]
        assert [engine["stack"]["scheduler"] for engine in engines] == ["sarathi,chunk_size=64"] * 4
        assert not {"pid", "record_folder"} & set(engines[0])
        assert [Path(engine["record_folder"]).name for engine in server.operators_info()["engines"]] == [
            "replica-0", "replica-1.2", "replica-2", "replica-3"
        ]  # fmt: skip
        processes = [
            child for child in psutil.Process(server.process.pid).children() if "spawn_main" in str(child.cmdline())
        ]
        assert len(processes) == 4
        for number in range(3):
            server.operate(f"/admin/replicas/{number}/drain")
        waiting = Client(server, {**LONG, "max_tokens": 3})  # for the one that has joined last
        wait_until(lambda: server.info()["queued"] == 1, "it is taken")
        threading.Event().wait(0.3)
        assert server.info()["queued"] == 1  # it is paused, too
        server.operate("/admin/resume")
        assert waiting.status() == 200
    records = {path.name: read_run(path) for path in folder.iterdir()}
    assert sorted(records) == ["replica-0", "replica-1", "replica-1.2", "replica-2", "replica-3"]
    assert all(record.complete for record in records.values())


@pytest.mark.slow
def test_under_load_with_replicas_dying_every_request_ends_once(model_folder: Path) -> None:
    num_requests, num_kills = 120, 2
    with running(model_folder, "--replicas", "2", "--max-queue", "2000", **LIMITS) as server:
        ends = asyncio.run(_load_and_kill(server, num_requests, num_kills))
        counts = collections.Counter(ends)
        assert sum(counts.values()) == num_requests
        assert set(counts) <= {"whole", "answered 503", "broken by an error"}, counts
        assert counts["whole"] > num_requests / 2
        assert server.info()["live"] == server.info()["queued"] == 0
        good = server.metric("vllm:request_success_total", finished_reason="length")
        assert good == counts["whole"]
        assert server.metric("vllm:request_success_total") <= num_requests  # some were refused while nobody lived


async def _load_and_kill(server: Running, num_requests: int, num_kills: int) -> list[str]:
    rng = random.Random(3)
    done = 0
    slots = asyncio.Semaphore(24)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, headers=OPERATOR) as client:

        async def one(i: int) -> str:
            nonlocal done
            async with slots:
                body = {"prompt": [i % 400] * 10, "max_tokens": 10 + i % 90, "ignore_eos": True, "stream": i % 3 > 0}
                try:
                    return await _end_of(client, body)
                finally:
                    done += 1

        async def kill() -> None:
            for k in range(num_kills):
                while done < (k + 1) * num_requests / (num_kills + 1):
                    await asyncio.sleep(0.01)
                engines = (await client.get("/admin/server_info")).json()["engines"]
                victim = rng.choice([engine for engine in engines if engine["state"] == "serving"])
                os.kill(victim["pid"], signal.SIGKILL)
                restarted = await client.post(f"/admin/replicas/{victim['id']}/restart")
                assert restarted.status_code == 200, restarted.text

        *ends, _ = await asyncio.gather(*(one(i) for i in range(num_requests)), kill())
        return [str(end) for end in ends]


async def _end_of(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """How a request ended. Raises where it has more than one end, or none."""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200 or not body["stream"]:
            await response.aread()
            if response.status_code == 200:
                assert response.json()["usage"]["completion_tokens"] == body["max_tokens"]
            return "whole" if response.status_code == 200 else f"answered {response.status_code}"
        tokens, finished, error, lines = 0, 0, 0, []
        async for line in response.aiter_lines():
            if line:
                lines.append(line)
        assert lines[-1] == "data: [DONE]"
        for line in lines[:-1]:
            event = json.loads(line.removeprefix("data: "))
            error += "error" in event
            tokens += len(event.get("choices", []))
            finished += any(choice["finish_reason"] for choice in event.get("choices", []))
        assert finished + error == 1
        assert error or tokens == body["max_tokens"]
        return "broken by an error" if error else "whole"
