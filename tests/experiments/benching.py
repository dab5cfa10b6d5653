"""`diptych bench`, as a test runs it, and servers for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from tests.experiments.command import diptych
from tests.openai_server import (
    DONE,
    Answer,
    Seen,
    text_chunk,
    usage_chunk,
)

SMALL = ["-w", "fixed", "--set", "workload.prompt_tokens=6", "--set", "workload.output_tokens=4"]

RANDOM_IDS = ["--vocab-size", "500"]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

Handler = Callable[[Seen, Answer], Awaitable[None]]


def encode(text: str) -> list[int]:
    """The fake server's tokenizer: a token a character."""
    return [ord(character) % 500 for character in text]


def model_server(generate: Handler) -> Handler:
    """A whole server: its model list, its tokenizer, and `generate` for everything that is to be generated."""

    async def handler(seen: Seen, answer: Answer) -> None:
        if seen.path == "/v1/models":
            await answer.whole(200, {"data": [{"id": "the-model"}]})
        elif seen.path == "/tokenize":
            await answer.whole(200, {"tokens": encode(seen.body["prompt"])})
        elif seen.path == "/detokenize":
            await answer.whole(200, {"prompt": "".join(chr(97 + i % 26) for i in seen.body["tokens"])})
        else:
            await generate(seen, answer)

    return handler


async def steady(seen: Seen, answer: Answer) -> None:
    """A token each 10 ms up to max_tokens, then the usage."""
    n = seen.body["max_tokens"]
    await answer.start()
    for i in range(n):
        await answer.write(text_chunk(" x", "length" if i == n - 1 else None), gap_s=0.01)
    await answer.write(usage_chunk(len(seen.body["prompt"]), n), DONE)
    await answer.end()


def bench(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str, *args: str
) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command, in this process; the run is in the folder `run`."""
    return diptych(monkeypatch, capsys, "bench", "--base-url", url, "-o", "run", *args)


async def no_model(seen: Seen, answer: Answer) -> None:
    await answer.whole(404, {"error": {"message": "The model `x` does not exist."}})
