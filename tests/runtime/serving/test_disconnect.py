"""A client that goes away, in whatever state its request is, gives its memory back, and nobody else notices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.serving.disconnecting import Client
from tests.runtime.serving.running import Running, running, wait_until

LONG = {"prompt": [5] * 30, "max_tokens": 200, "ignore_eos": True, "seed": 1}


@pytest.fixture(scope="module")
def tight(model_folder: Path) -> Iterator[Running]:
    """384 tokens of memory, four sequences at once, and prompts in small chunks."""
    limits = {"num_blocks": 24, "max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 300}
    with running(model_folder, "--check", prefix_caching="false", **limits) as started:
        yield started


def _nothing_is_left(server: Running) -> bool:
    return server.info()["live"] == 0 and server.num_blocks_held() == 0


def _kinds(server: Running, since_step: int) -> set[str]:
    return {row["kind"] for row in server.record("decisions", since_step)}


def _next_step(server: Running) -> int:
    return max((row["step"] for row in server.record("steps")), default=-1) + 1


def test_while_queued(tight: Running) -> None:
    tight.operate("/admin/pause")
    client = Client(tight, LONG)
    wait_until(lambda: tight.info()["engines"][0]["waiting"] == 1, "it waits")
    client.leave()
    wait_until(lambda: tight.info()["engines"][0]["waiting"] == 0, "it is gone while nothing runs")
    assert tight.info()["queued"] == 0
    tight.operate("/admin/resume")
    assert _nothing_is_left(tight)


def test_while_prefilling(tight: Running) -> None:
    before = _next_step(tight)
    client = Client(tight, {**LONG, "prompt": list(range(250)), "max_tokens": 40})
    wait_until(lambda: "chunk" in _kinds(tight, before), "its prefill has begun")
    tight.operate("/admin/pause")
    assert tight.num_blocks_held() > 0
    client.leave()
    wait_until(lambda: _nothing_is_left(tight), "its blocks are free")
    tight.operate("/admin/resume")


@pytest.mark.parametrize("stream", [True, False])
def test_while_decoding(tight: Running, stream: bool) -> None:
    before = _next_step(tight)
    client = Client(tight, {**LONG, "stream": stream})
    if stream:
        assert b"200 OK" in client.read_some()
    wait_until(lambda: "decode" in _kinds(tight, before), "it decodes")
    tight.operate("/admin/pause")
    assert tight.num_blocks_held() > 0
    client.leave()
    wait_until(lambda: _nothing_is_left(tight), "its blocks are free")
    tight.operate("/admin/resume")


def test_while_preempted_and_the_others_get_the_same_answers(tight: Running) -> None:
    requests = [{**LONG, "prompt": [5 + i] * 30, "seed": i} for i in range(4)]
    alone = [tight.http.post("/v1/completions", json=body).json()["choices"] for body in requests[:2]]
    before = _next_step(tight)
    clients = []
    for body in requests:  # one after another: the last to be admitted is the one that is preempted
        clients.append(Client(tight, body))
        wait_until(lambda: tight.info()["live"] == len(clients), "it has been taken")
    wait_until(lambda: "preempt" in _kinds(tight, before), "somebody is preempted")
    tight.operate("/admin/pause")
    decisions = tight.record("decisions", before)
    ids = sorted({row["request_id"] for row in decisions if row["kind"] == "admit"})
    preempted = [row["request_id"] for row in decisions if row["kind"] == "preempt"]
    assert preempted[-1] in ids[2:], "the two whose answers are compared go on"
    for client in clients[2:]:
        client.leave()
    wait_until(lambda: tight.info()["live"] == 2, "two are gone")
    tight.operate("/admin/resume")
    assert [client.json()["choices"] for client in clients[:2]] == alone
    wait_until(lambda: _nothing_is_left(tight), "nothing is left")


def test_a_hundred_clients_that_come_and_go_leave_nothing(tight: Running) -> None:
    clients = [Client(tight, {**LONG, "seed": i, "stream": i % 2 == 0}) for i in range(100)]
    survivors = clients[::10]
    for client in clients:
        if client not in survivors:
            client.leave()
    assert [client.status() for client in survivors] == [200] * 10
    wait_until(lambda: _nothing_is_left(tight), "nothing is left")
    assert tight.http.get("/health").status_code == 200
