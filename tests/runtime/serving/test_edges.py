"""What is refused at the edge, with which status, and with a message that says what to do."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.serving.disconnecting import Client
from tests.runtime.serving.running import OPERATOR, PATIENCE, Running, running, wait_until


@pytest.mark.parametrize(
    ("body", "says", "param"),
    [
        ({"prompt": "x", "max_tokens": 0}, "max_tokens must be at least 1, got 0", "max_tokens"),
        ({"prompt": "x", "max_tokens": "5"}, "max_tokens: Input should be a valid integer", "max_tokens"),
        ({"prompt": "x", "n": 2, "temperature": 0}, "n must be 1 when temperature is 0", None),
        ({"prompt": "x", "stop": [""]}, "stop must hold no empty string", None),
        ({"prompt": "x", "stop": 5}, "stop: Input should be a valid list", "stop"),
        ({"prompt": ""}, "the prompt is empty", "prompt"),
        ({"prompt": []}, "prompt: give a text", "prompt"),
        ({"prompt": [1, "a"]}, "prompt: give a text", "prompt"),
        ({"prompt": [[1], [480]]}, "token id 480 is outside the vocabulary of 480", "prompt"),
        ({"prompt": [-1]}, "token id -1 is outside the vocabulary", "prompt"),
        ({}, "prompt: Field required", "prompt"),
        ({"prompt": "x", "logprobs": 1000}, "logprobs: Input should be less than or equal to 100", "logprobs"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options needs stream: true", None),
        ({"prompt": "x", "response_format": {"type": "json_object"}}, "response_format is not supported", None),
        ({"prompt": "x", "echo": True, "logprobs": 1}, "echo: not together with logprobs", "echo"),
        ({"prompt": "x", "slo": {"ttft_ms": 0}}, "slo.ttft_ms: Input should be greater than 0", "slo"),
        ({"prompt": "x", "priority": 2**31}, "priority: Input should be less than or equal to", "priority"),
        ({"prompt": "x", "seed": 2**64}, "seed must be in", None),
        ({"prompt": "x", "max_tokens": None, "min_tokens": 2**64 - 1}, "min_tokens must be in [0, 2147483647]", None),
        ({"prompt": "x", "top_k": 2**70}, "top_k must be in [-1, 2147483647]", None),
        ({"prompt": "x", "best_of": 5}, "best_of is not supported here", "best_of"),
        ({"prompt": "\ud800"}, "prompt: the text has half a character", "prompt"),
    ],
)
def test_a_bad_field_is_named_in_a_400(server: Running, body: dict[str, Any], says: str, param: str | None) -> None:
    response = server.http.post(
        "/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert says in error["message"]
    assert error["type"] == "BadRequestError"
    assert error["code"] == 400
    if param is not None:
        assert error["param"] == param


def test_a_sequence_that_is_too_long_is_refused_with_both_numbers(server: Running) -> None:
    response = server.http.post("/v1/completions", json={"prompt": [7] * 1024, "max_tokens": 1})
    assert response.status_code == 400
    assert "the prompt has 1024 tokens; the limit of 1024" in response.json()["error"]["message"]
    response = server.http.post("/v1/completions", json={"prompt": [7] * 1000, "max_tokens": 25})
    assert response.status_code == 400
    assert "1000 tokens and max_tokens=25 make 1025; the limit is 1024" in response.json()["error"]["message"]
    assert server.http.post("/v1/completions", json={"prompt": [7] * 1000, "max_tokens": 24}).status_code == 200


def test_fields_that_clients_send_by_habit_and_nulls_are_taken(server: Running) -> None:
    body = {"prompt": "x", "max_tokens": 1, "user": "u", "best_of": 1, "suffix": None, "logit_bias": None, "foo": None}
    assert server.http.post("/v1/completions", json=body).status_code == 200
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "tools": [], "store": False, "n": 1}
    assert server.http.post("/v1/chat/completions", json=chat).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b'{"prompt": NaN}', b"\xff\xfe", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_a_400(server: Running, content: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/generate", "/tokenize", "/detokenize"):
        response = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, (path, response.text)
        assert response.json()["error"]["message"]


def test_unknown_paths_models_and_methods_are_named(server: Running) -> None:
    assert server.http.get("/v1/nothing").json()["error"]["code"] == 404
    assert server.http.get("/v1/models/other").json()["error"]["param"] == "model"
    assert server.http.get("/v1/completions").json()["error"]["code"] == 405


def test_tokens_and_text_turn_into_each_other(server: Running) -> None:
    text = "Naïve café, 東京 and 🚀"
    tokens = server.http.post("/tokenize", json={"prompt": text}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert server.http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"] == text
    chat = server.http.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]}).json()["tokens"]
    assert server.http.post("/detokenize", json={"tokens": chat}).json()["prompt"] == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


# A server with keys, a short queue and small bodies


@pytest.fixture(scope="module")
def strict(model_folder: Path) -> Iterator[Running]:
    flags = "--api-key sk-plain --api-key acme:sk-acme --max-queue 3 --max-queue-tokens 100 --max-body-mib 0.01"
    with running(model_folder, *flags.split(), "--request-timeout", "4", num_blocks=64, max_model_len=512) as started:
        started.http.headers["Authorization"] = "Bearer sk-acme"
        yield started


def test_without_a_key_there_is_401_but_for_health_and_metrics(strict: Running) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    for key in ("", "Bearer nonsense", "sk-plain", "Bearer operators-only"):
        response = strict.http.post("/v1/completions", json=body, headers={"Authorization": key})
        assert response.status_code == 401, key
        assert response.json()["error"]["type"] == "AuthenticationError"
    for key in ("Bearer sk-plain", "Bearer sk-acme"):
        assert strict.http.post("/v1/completions", json=body, headers={"Authorization": key}).status_code == 200
    for path in ("/health", "/metrics", "/version"):
        assert strict.http.get(path, headers={"Authorization": ""}).status_code == 200
    assert strict.http.post("/admin/pause").status_code == 401


def test_a_large_body_is_refused_with_and_without_its_length(strict: Running) -> None:
    body = json.dumps({"prompt": "x" * 20_000}).encode()
    kind = {"Content-Type": "application/json"}
    assert strict.http.post("/v1/completions", content=body, headers=kind).status_code == 413
    pieces = (body[i : i + 1000] for i in range(0, len(body), 1000))
    assert strict.http.post("/v1/completions", content=pieces, headers=kind).status_code == 413


def test_a_full_queue_answers_503_and_when_to_come_again(strict: Running) -> None:
    strict.operate("/admin/pause")
    try:
        waiting = [Client(strict, {"prompt": [5] * 20, "max_tokens": 2}) for _ in range(2)]
        wait_until(lambda: strict.info()["queued"] == 2, "two requests wait")
        for body, says in (
            ({"prompt": [5], "n": 2}, "2 requests wait already; the queue holds 3"),
            ({"prompt": [5] * 61}, "40 prompt tokens wait already, and this request has 61; the queue holds 100"),
        ):
            response = strict.http.post("/v1/completions", json=body)
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert says in response.json()["error"]["message"]
    finally:
        strict.operate("/admin/resume")
    assert [client.status() for client in waiting] == [200, 200]
    assert strict.metric("vllm:admission_rejections_total", reason="requests") == 1
    assert strict.metric("vllm:admission_rejections_total", reason="tokens") == 1


def test_a_request_that_takes_too_long_is_ended_and_told_so(strict: Running) -> None:
    strict.operate("/admin/pause")
    try:
        response = strict.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
        assert response.status_code == 504
        assert "longer than the server's limit of 4 s" in response.json()["error"]["message"]
        wait_until(lambda: strict.info()["live"] == 0, "the request is gone")
    finally:
        strict.operate("/admin/resume")


def test_tenants_priorities_and_objectives_reach_the_policies(server: Running) -> None:
    body = {"prompt": "x", "max_tokens": 1, "priority": -3, "slo": {"ttft_ms": 200, "tpot_ms": 50}, "session": 9}
    assert server.http.post("/v1/completions", json=body, headers={"X-Tenant": "acme"}).status_code == 200


def test_a_taken_port_is_said_in_one_line(server: Running, model_folder: Path) -> None:
    port = server.url.rsplit(":", 1)[1]
    with (
        pytest.raises(AssertionError, match=f"cannot listen on 127.0.0.1:{port} .*choose another --port"),
        running(model_folder, "--port", port),
    ):
        pass


def test_headers_that_are_no_text_do_no_harm(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as raw:
        raw.sendall(
            b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: \xff\xfe\r\nX-Tenant: \xff\r\nConnection: close\r\n\r\n"
        )
        assert b"200 OK" in raw.makefile("rb").read()


def test_operators_need_their_own_key(server: Running) -> None:
    assert server.http.post("/admin/drain").status_code == 401
    assert server.http.get("/admin/record", params={"table": "nothing"}, headers=OPERATOR).status_code == 400
    bad = server.http.post("/admin/policies", json={"scheduler": "nonesuch"}, headers=OPERATOR)
    assert bad.status_code == 400
    assert "there is no scheduler 'nonesuch'" in bad.json()["error"]["message"]
    assert server.http.post("/admin/policies", json={}, headers=OPERATOR).status_code == 400
