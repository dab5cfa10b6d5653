"""What came and what became of it, for whoever watches."""

from __future__ import annotations

import json
from typing import Any

import pytest

from policies.prefix import KEY_BYTES, block_keys
from policies.request import Slo
from runtime.sampling.params import SamplingParams
from runtime.sequence import Details
from runtime.serving import event_log
from runtime.serving.engine_client import Prompt
from runtime.serving.event_log import EventLog
from tests.runtime.serving.disconnecting import Client
from tests.runtime.serving.running import OPERATOR, Running, wait_until


def prompt(tokens: int = 40, **params: Any) -> Prompt:
    return Prompt(list(range(tokens)), SamplingParams(**params), Details(tenant="a", slo=Slo(ttft_ns=7)))


def test_events_are_numbered_paged_and_forgotten_from_the_oldest_on() -> None:
    log = EventLog(16, 100, keep=5)
    for i in range(8):
        log.arrived([i], [prompt()])
    page = log.page(-1, 2)
    assert [event["id"] for event in page["events"]] == [3, 4]
    assert (page["oldest"], page["last"], page["more"]) == (3, 4, True)
    page = log.page(4, 100)
    assert [event["id"] for event in page["events"]] == [5, 6, 7]
    assert (page["last"], page["more"]) == (7, False)
    assert log.page(7, 100)["events"] == []
    assert log.page(7, 100)["last"] == 7
    assert log.page(10**9, 100)["events"] == []


def test_each_continuation_arrives_with_what_a_policy_is_told() -> None:
    log = EventLog(None, 100)
    log.arrived([4, 5, 6], [prompt(90, n=2, max_tokens=50), prompt(3, max_tokens=7, ignore_eos=True)])
    first, second, third = log.page(-1, 10)["events"]
    assert (first["id"], second["id"], third["id"]) == (4, 5, 6)
    assert first | {"id": 5} == second
    assert (first["prompt_tokens"], first["max_tokens"], first["forced"], first["tenant"]) == (90, 10, False, "a")
    assert (third["max_tokens"], third["forced"], third["slo"]["ttft_ns"], third["keys"]) == (7, True, 7, "")


def test_blocks_are_named_only_while_somebody_watches_and_their_names_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = EventLog(16, 100)
    log.arrived([0], [prompt()])
    assert log.page(-1, 10)["events"][0]["keys"] is None
    log.arrived([1], [prompt()])
    keys = block_keys(list(range(40)), 16)
    assert log.page(0, 10)["events"][0]["keys"] == b"".join(keys).hex()
    monkeypatch.setattr(event_log, "PAGE_KEY_BYTES", 3 * KEY_BYTES)
    monkeypatch.setattr(event_log, "KEEP_KEY_BYTES", 8 * KEY_BYTES)
    for i in range(2, 9):
        log.arrived([i], [prompt()])
    page = log.page(-1, 10)
    assert (page["oldest"], [event["id"] for event in page["events"]], page["more"]) == (5, [5, 6], True)


def read(server: Running, after: int = -1) -> dict[str, Any]:
    answer = server.http.get("/admin/events", params={"after": after}, headers=OPERATOR)
    assert answer.status_code == 200
    return dict(answer.json())


def test_a_watcher_sees_who_comes_how_far_they_are_and_how_they_end(server: Running) -> None:
    assert server.http.get("/admin/events").status_code == 401
    assert server.http.get("/admin/events", params={"limit": 0}, headers=OPERATOR).status_code == 400
    before = read(server)
    while before["more"]:
        before = read(server, before["last"])
    body = {"prompt": "a secret prompt", "max_tokens": 5, "ignore_eos": True, "priority": 3, "session": 8}
    assert server.http.post("/v1/completions", json=body, headers={"X-Tenant": "t"}).status_code == 200
    leaving = Client(server, {"prompt": [9] * 40, "max_tokens": 900, "ignore_eos": True})
    wait_until(lambda: any(tokens > 2 for _, tokens in read(server)["alive"]), "it has tokens")
    during = read(server, before["last"])
    leaving.leave()
    wait_until(lambda: not read(server)["alive"], "nobody is left")
    after = read(server, before["last"])

    came, ended, left, gone = after["events"]
    assert [event["kind"] for event in after["events"]] == ["arrival", "end", "arrival", "end"]
    assert (came["tenant"], came["priority"], came["session"]) == ("t", 3, 8)
    assert (came["forced"], came["max_tokens"], ended["output_tokens"], ended["reason"]) == (True, 5, 5, "length")
    assert came["at_ns"] < ended["first_token_ns"] < ended["at_ns"] < left["at_ns"] < gone["at_ns"] < after["now_ns"]
    assert (left["id"], left["prompt_tokens"], left["keys"]) == (
        gone["id"],
        40,
        b"".join(block_keys([9] * 40, 16)).hex(),
    )
    assert gone["reason"] == "abort"
    assert [request_id for request_id, _ in during["alive"]] == [left["id"]]
    assert during["engines"][0]["running"] == 1
    assert during["engines"][0]["free_blocks"] < during["engines"][0]["num_blocks"] == 512
    assert after["output_tokens"] - before["output_tokens"] >= 5 + gone["output_tokens"] - 1
    assert "secret" not in json.dumps(after)
