"""The requests and the parsing rules of `vllm bench serve`, of SGLang's bench_serving, and of curl."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.runtime.serving.running import Running


@dataclass
class Measured:
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    text: str = ""
    usage: dict[str, Any] | None = None
    writes: int = 0


def _vllm_rules(server: Running, path: str, payload: dict[str, Any]) -> Measured:
    """Events end with an empty line; comments are skipped; a chunk with choices is a token, others are the usage."""
    found, buffer, done = Measured(), "", False
    start = last = time.perf_counter()
    with server.http.stream("POST", path, json=payload, headers={"x-request-id": "bench-7"}) as response:
        assert response.status_code == 200
        assert response.headers["x-request-id"] == "bench-7"
        for piece in response.iter_text():
            found.writes += 1
            buffer += piece
            while "\n\n" in buffer:
                message, buffer = buffer.split("\n\n", 1)
                if message.startswith(":"):
                    continue
                chunk = message.removeprefix("data: ")
                if chunk == "[DONE]":
                    done = True
                    continue
                data = json.loads(chunk)
                if data["choices"]:
                    choice = data["choices"][0]
                    now = time.perf_counter()
                    if found.ttft == 0.0:
                        found.ttft = now - start
                    else:
                        found.itls.append(now - last)
                    last = now
                    found.text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                elif data.get("usage"):
                    found.usage = data["usage"]
    assert done
    assert buffer == ""
    return found


@pytest.mark.parametrize("chat", [False, True])
def test_vllm_bench_counts_every_token_once(server: Running, chat: bool) -> None:
    payload: dict[str, Any] = {
        "model": "babel",
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    if chat:
        messages = [{"role": "user", "content": [{"type": "text", "text": "Shopping list"}]}]
        path, payload = "/v1/chat/completions", {**payload, "messages": messages, "max_completion_tokens": 20}
    else:
        path, payload = "/v1/completions", {**payload, "prompt": "Shopping list", "max_tokens": 20, "logprobs": None}
    found = _vllm_rules(server, path, payload)
    assert found.usage is not None
    assert found.usage["completion_tokens"] == 20 == len(found.itls) + 1
    assert found.ttft > 0
    assert found.text


def test_one_write_a_step_holds_all_choices_of_a_client(server: Running) -> None:
    payload = {"prompt": "Hello", "max_tokens": 30, "n": 8, "ignore_eos": True, "stream": True}
    steps = server.info()["engines"][0]["steps"]["count"]
    found = _vllm_rules(server, "/v1/completions", payload)
    steps = server.info()["engines"][0]["steps"]["count"] - steps
    assert len(found.itls) + 1 == 30 * 8
    assert found.writes <= steps + 1


def test_sglang_bench_reads_openai_streams_line_by_line(server: Running) -> None:
    payload = {
        "model": "babel",
        "prompt": "Hello",
        "best_of": 1,
        "max_tokens": 12,
        "stream": True,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    text = ""
    with server.http.stream("POST", "/v1/completions", json=payload) as response:
        for line in response.iter_lines():
            if not line:
                continue
            chunk = line.removeprefix("data: ")
            if chunk != "[DONE]":
                text += json.loads(chunk)["choices"][0]["text"]  # every chunk has a choice: no usage unasked
    assert text


def test_sglang_bench_reads_the_native_streams_whole_text(server: Running) -> None:
    payload = {
        "text": "Hello",
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True},
        "stream": True,
        "lora_path": None,
        "return_logprob": False,
        "logprob_start_len": -1,
    }
    texts, counts = [], []
    with server.http.stream("POST", "/generate", json=payload) as response:
        for line in response.iter_lines():
            chunk = line.removeprefix("data: ")
            if line and chunk != "[DONE]":
                data = json.loads(chunk)
                texts.append(data["text"])
                counts.append(data["meta_info"]["completion_tokens"])
    assert counts == list(range(1, 13))
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    whole = server.http.post("/generate", json={**payload, "stream": False, "return_logprob": True}).json()
    assert whole["text"] == texts[-1]
    assert whole["meta_info"]["finish_reason"] == {"type": "length", "length": 12}
    assert [entry[1] for entry in whole["meta_info"]["output_token_logprobs"]] == whole["output_ids"]


def test_what_the_benchmarks_ask_beside_generating_is_there(server: Running) -> None:
    for path in ("/health", "/v1/models", "/model_info", "/server_info", "/metrics", "/version"):
        assert server.http.get(path).status_code == 200
    answer = server.http.post("/flush_cache", headers={"Authorization": "Bearer operators-only"})
    assert answer.json()["blocks"] >= 0


def test_curl_streams(server: Running) -> None:
    body = json.dumps({"prompt": "Hello", "max_tokens": 3, "stream": True, "ignore_eos": True})
    command = ["curl", "-sN", f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert sum(line.startswith("data: {") for line in lines) == 3
