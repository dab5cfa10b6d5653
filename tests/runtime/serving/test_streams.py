"""Streamed answers are the whole ones, piece by piece, whatever is asked for."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from runtime.serving.logprobs import joined
from tests.runtime.conftest import PROMPTS
from tests.runtime.serving.running import PATIENCE, Running

NUM_PROMPTS = 200


def _request(seed: int) -> dict[str, Any]:
    """A request with some of: stops that do and do not come, several choices, log probabilities, an echo."""
    rng = random.Random(seed)
    letters = "aeionrst,. \n"
    body: dict[str, Any] = {
        "prompt": rng.choice(PROMPTS)[: rng.randint(1, 80)],
        "max_tokens": rng.randint(1, 24),
        "seed": seed,
        "temperature": rng.choice([0.7, 1.0, 1.5]),
        "n": rng.choice([1, 1, 1, 2, 4]),
        "ignore_eos": rng.random() < 0.5,
        "include_stop_str_in_output": rng.random() < 0.3,
    }
    if rng.random() < 0.7:
        body["stop"] = ["".join(rng.choices(letters, k=rng.randint(1, 2))) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.3:
        body["min_tokens"] = rng.randint(0, body["max_tokens"])
    if rng.random() < 0.5:
        body["logprobs"] = rng.randint(0, 4)
    elif rng.random() < 0.3:
        body["echo"] = True
    return body


async def _streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of a stream, put together."""
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    choices = [{"text": "", "logprobs": [], "finish_reason": None, "stop_reason": None} for _ in range(body["n"])]
    usages = []
    async with client.stream("POST", "/v1/completions", json={**body, **options}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            usages.append(chunk["usage"]["completion_tokens"])
            for piece in chunk["choices"]:
                choice = choices[piece["index"]]
                assert choice["finish_reason"] is None, "a choice went on after its end"
                choice["text"] += piece["text"]
                if piece["logprobs"] is not None:
                    choice["logprobs"].append(piece["logprobs"])
                choice["finish_reason"], choice["stop_reason"] = piece["finish_reason"], piece["stop_reason"]
    assert usages == sorted(usages)
    for choice in choices:
        choice["logprobs"] = joined(choice["logprobs"]) if "logprobs" in body else None
        choice["usage"] = usages[-1]
    return choices


async def _whole(client: httpx.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    usage = answer["usage"]["completion_tokens"]
    kept = ("text", "logprobs", "finish_reason", "stop_reason")
    return [{**{name: choice[name] for name in kept}, "usage": usage} for choice in answer["choices"]]


def test_streamed_text_is_the_whole_text_for_many_prompts(server: Running) -> None:
    async def compare() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
            together = asyncio.Semaphore(16)

            async def one(seed: int) -> list[dict[str, Any]]:
                async with together:
                    body = _request(seed)
                    whole, streamed = await asyncio.gather(_whole(client, body), _streamed(client, body))
                    _assert_same(streamed, whole)
                    return whole

            return [choice for group in await asyncio.gather(*map(one, range(NUM_PROMPTS))) for choice in group]

    choices = asyncio.run(compare())
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons.count("stop") > 50  # or the stops of this test stop nothing
    assert reasons.count("length") > 50
    assert any(isinstance(choice["stop_reason"], str) for choice in choices)
    assert any("\ufffd" in choice["text"] for choice in choices)  # parts of characters are among what was said


def _assert_same(streamed: list[dict[str, Any]], whole: list[dict[str, Any]]) -> None:
    """Log probabilities within a little: the batch that a request runs in may change the last bits."""
    for a, b in zip(streamed, whole, strict=True):
        left, right = a.pop("logprobs"), b.pop("logprobs")
        assert a == b
        assert (left is None) == (right is None)
        if left is not None:
            assert left["tokens"] == right["tokens"]
            assert left["text_offset"] == right["text_offset"]
            assert left["token_logprobs"] == pytest.approx(right["token_logprobs"], abs=1e-3)
            for one, other in zip(left["top_logprobs"], right["top_logprobs"], strict=True):
                assert sorted(one.values()) == pytest.approx(sorted(other.values()), abs=1e-3)


def test_a_stop_string_ends_the_request_in_the_engine_as_one_that_stopped(server: Running) -> None:
    body = {"prompt": "Hello", "max_tokens": 900, "seed": 1, "ignore_eos": True, "stop": ["e"]}
    steps = server.info()["engines"][0]["steps"]["count"]
    assert server.info()["live"] == 0
    answer = server.http.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] == "e"
    spent = answer["usage"]["completion_tokens"]
    assert spent < 300
    info = server.info()
    assert info["live"] == 0
    assert info["engines"][0]["steps"]["count"] - steps < spent + 20  # and not the 900 that it would have gone on for
