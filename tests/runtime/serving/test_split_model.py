"""Engines whose model is spread over several ranks, behind a server."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from tests.runtime.serving.disconnecting import Client
from tests.runtime.serving.running import Running, nothing_left, running, wait_until

LIMITS = {"num_blocks": 256, "max_num_seqs": 4, "max_model_len": 2048}
FOREVER = {"prompt": [5] * 10, "max_tokens": 1900, "ignore_eos": True, "stream": True}


def ranks_of(engine: psutil.Process) -> list[psutil.Process]:
    return [child for child in engine.children() if "runtime.parallel.follower" in child.cmdline()]


def begin(server: Running, client: Client) -> None:
    assert b"200 OK" in client.read_some()


def test_when_rank_0_is_killed_the_others_go_and_everybody_is_told(model_folder: Path) -> None:
    with running(model_folder, "--tensor-parallel", "2", "--check", **LIMITS) as server:
        (rank,) = ranks_of(server.engine())
        answer = server.http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 5, "ignore_eos": True})
        assert answer.json()["usage"]["completion_tokens"] == 5
        streaming = Client(server, FOREVER)
        begin(server, streaming)
        killed = time.monotonic()
        server.engine().kill()
        assert b"the engine process was killed by signal 9" in streaming.everything()
        nothing_left([rank.pid])
        assert time.monotonic() - killed < 20
        assert server.http.get("/health").status_code == 503


@pytest.mark.skipif(
    "DIPTYCH_TEST_RANKS" not in os.environ, reason="six processes with PyTorch: set DIPTYCH_TEST_RANKS=1 to run it"
)
def test_a_replica_that_loses_a_rank_is_dead_until_it_is_restarted_and_the_other_one_serves(model_folder: Path) -> None:
    with running(model_folder, "--tensor-parallel", "2", "--replicas", "2", **LIMITS) as server:
        clients = [Client(server, FOREVER) for _ in range(2)]
        for client in clients:
            begin(server, client)
        (rank,) = ranks_of(server.engine(1))
        rank.kill()
        wait_until(lambda: [e["state"] for e in server.info()["engines"]] == ["serving", "dead"], "it is dead")
        assert server.http.get("/health").status_code == 200
        server.operate("/admin/replicas/1/restart")
        wait_until(lambda: [e["state"] for e in server.info()["engines"]] == ["serving"] * 2, "it is back")
        for client in clients:
            client.leave()
        texts = {Client(server, {"prompt": [5] * 10, "max_tokens": 5}).json()["choices"][0]["text"] for _ in range(4)}
        assert len(texts) >= 1
        assert len(ranks_of(server.engine(1))) == 1
