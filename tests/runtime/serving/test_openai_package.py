"""The openai package is served right: sync and async, whole and streamed, with its errors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from tests.runtime.serving.running import Running

MODEL = "babel"
GO_ON = {"ignore_eos": True}
MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [
    {"role": "system", "content": "Say little."},
    {"role": "user", "content": [{"type": "text", "text": "Where is the "}, {"type": "text", "text": "station?"}]},
]


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_a_completion_has_text_usage_and_a_reason(client: openai.OpenAI) -> None:
    done = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=8, temperature=0)
    (choice,) = done.choices
    assert done.object == "text_completion"
    assert done.id.startswith("cmpl-")
    assert choice.text
    assert choice.finish_reason == "length"
    assert done.usage is not None
    assert done.usage.completion_tokens == 8
    assert done.usage.total_tokens == done.usage.prompt_tokens + 8


def test_a_seed_repeats_the_draws_and_another_one_does_not(client: openai.OpenAI) -> None:
    texts = [
        client.completions.create(model=MODEL, prompt="Hello", max_tokens=24, seed=seed).choices[0].text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_several_prompts_with_several_continuations_come_in_order(client: openai.OpenAI) -> None:
    done = client.completions.create(
        model=MODEL, prompt=["Hello", "Shopping list:"], n=3, max_tokens=4, echo=True, extra_body=GO_ON
    )
    assert [choice.index for choice in done.choices] == list(range(6))
    assert [choice.text.startswith("Hello") for choice in done.choices] == [True] * 3 + [False] * 3
    assert done.usage is not None
    assert done.usage.completion_tokens == 24


def test_logprobs_name_the_sampled_token_among_the_best(client: openai.OpenAI) -> None:
    done = client.completions.create(model=MODEL, prompt="Hello", max_tokens=6, logprobs=3, temperature=0)
    found = done.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 6
    for logprob, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert logprob == max(top.values())
        assert len(top) <= 3


def test_a_chat_answers_whole_and_streamed_alike(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=20, seed=9, logprobs=True, top_logprobs=2
    )
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_completion_tokens=20,
        seed=9,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len(logprobs.content) == whole.usage.completion_tokens
    assert all(len(item.top_logprobs) == 2 for item in logprobs.content)


def test_many_streams_at_once_are_each_their_own(server: Running) -> None:
    async def one(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt=f"Number {seed}", max_tokens=16, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everybody() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            together = await asyncio.gather(*(one(client, seed) for seed in range(24)))
            return together, [await one(client, seed) for seed in range(0, 24, 6)]

    together, alone = asyncio.run(everybody())
    assert together[::6] == alone
    assert len(set(together)) > 12


def test_the_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_errors_are_those_that_the_package_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="`other` does not exist"):
        client.completions.create(model="other", prompt="Hello")
    with pytest.raises(openai.BadRequestError, match=r"temperature must be in \[0, 2\], got 3"):
        client.completions.create(model=MODEL, prompt="Hello", temperature=3)
    with pytest.raises(openai.BadRequestError, match="no such role: pirate"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "pirate", "content": "Arr"}])  # type: ignore
    with pytest.raises(openai.BadRequestError, match="logit_bias is not supported here") as caught:
        client.completions.create(model=MODEL, prompt="Hello", logit_bias={"5": 1})
    assert caught.value.param == "logit_bias"
