"""The client against a real server on a socket that misbehaves in every way the tests ask for."""

from __future__ import annotations

import asyncio
import inspect
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from typing import Any

import pytest

from runtime import client as api
from runtime.client import AsyncClient, Client
from runtime.openai_wire import Choice, ChunkStream, parse_retry_after
from tests.openai_server import DONE, Answer, Seen, chat_chunk, event, serving, text_chunk, usage_chunk

Call = Callable[..., Any]
HI = [{"role": "user", "content": "Hi"}]


def sync_call(url: str, method: str, *args: Any, settings: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    with Client(url, **(settings or {})) as client:
        result = getattr(client, method)(*args, **kwargs)
        return list(result) if inspect.isgenerator(result) else result


def async_call(url: str, method: str, *args: Any, settings: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    async def main() -> Any:
        async with AsyncClient(url, **(settings or {})) as client:
            result = getattr(client, method)(*args, **kwargs)
            return [chunk async for chunk in result] if inspect.isasyncgen(result) else await result

    return asyncio.run(main())


@pytest.fixture(params=[sync_call, async_call], ids=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Call:
    """Calls a method of a client of either kind; of a stream it gives the list of chunks."""
    return request.param


def answers(*pieces: bytes, gap_s: float = 0.0) -> Callable[[Seen, Answer], Awaitable[None]]:
    async def handler(seen: Seen, answer: Answer) -> None:
        await answer.start()
        await answer.write(*pieces, gap_s=gap_s)
        await answer.end()

    return handler


def whole(status: int, content: object, **headers: str) -> Callable[[Seen, Answer], Awaitable[None]]:
    async def handler(seen: Seen, answer: Answer) -> None:
        await answer.whole(status, content, **headers)

    return handler


STREAM = text_chunk(" snow") + text_chunk("☃", "stop") + usage_chunk(3, 2) + DONE


def test_a_whole_completion_comes_back_with_its_choices_and_usage(call: Call) -> None:
    logprobs = {"tokens": ["a"], "token_logprobs": [-0.5]}
    choices = [
        {"index": 0, "text": "one", "finish_reason": "stop", "logprobs": logprobs},
        {"index": 1, "text": "two", "finish_reason": "length"},
    ]
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    answer = {"id": "cmpl-7", "model": "m", "choices": choices, "usage": usage}
    with serving(whole(200, answer)) as server:
        found = call(server.url, "complete", [1, 2, 3], model="m", max_tokens=4, n=2)
    assert found.choices == (Choice(0, "one", "stop", logprobs), Choice(1, "two", "length", None))
    assert (found.id, found.text, found.usage) == ("cmpl-7", "one", api.Usage(5, 2, 4))
    assert server.bodies("/v1/completions") == [{"model": "m", "prompt": [1, 2, 3], "max_tokens": 4, "n": 2}]


def test_a_chat_answer_comes_back_with_its_message(call: Call) -> None:
    message = {"role": "assistant", "content": "Hello"}
    answer = {"id": "c", "model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    with serving(whole(200, answer)) as server:
        assert call(server.url, "chat", HI, model="m", max_completion_tokens=9).text == "Hello"
    assert server.bodies("/v1/chat/completions") == [{"model": "m", "messages": HI, "max_completion_tokens": 9}]


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 64, 10_000])
def test_a_stream_is_the_same_wherever_its_bytes_are_cut(call: Call, cut: int) -> None:
    pieces = [STREAM[i : i + cut] for i in range(0, len(STREAM), cut)]
    with serving(answers(*pieces)) as server:
        chunks = call(server.url, "stream_completion", "The", model="m", max_tokens=2)
    assert [(c.index, c.text, c.finish_reason, c.has_output) for c in chunks] == [
        (0, " snow", None, True),
        (0, "☃", "stop", True),
        (None, "", None, False),
    ]
    assert [c.usage for c in chunks] == [None, None, api.Usage(3, 2)]
    body = {"model": "m", "prompt": "The", "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    assert server.bodies("/v1/completions") == [body]


def test_the_parser_gives_the_same_chunks_for_every_cut_in_two() -> None:
    whole_stream = ChunkStream()
    expected = [*whole_stream.feed(STREAM), *whole_stream.end()]
    assert len(expected) == 3
    for at in range(len(STREAM) + 1):
        stream = ChunkStream()
        assert [*stream.feed(STREAM[:at]), *stream.feed(STREAM[at:]), *stream.end()] == expected


def test_a_chat_stream_counts_content_and_reasoning_but_no_role_and_no_end(call: Call) -> None:
    deltas: list[tuple[dict[str, Any], str | None]] = [
        ({"role": "assistant", "content": ""}, None),
        ({"reasoning_content": "hm"}, None),
        ({"content": "Hi"}, None),
        ({}, "stop"),
    ]
    with serving(answers(*(chat_chunk(*delta) for delta in deltas), usage_chunk(4, 3), DONE)) as server:
        chunks = call(server.url, "stream_chat", HI, model="m")
    assert [(c.text, c.has_output) for c in chunks] == [
        ("", False),
        ("", True),
        ("Hi", True),
        ("", False),
        ("", False),
    ]
    assert [c.finish_reason for c in chunks] == [None, None, None, "stop", None]


def test_comments_other_fields_and_carriage_returns_are_no_chunks(call: Call) -> None:
    pieces = [b": keep-alive\r\n\r\n", b"event: message\r\nid: 3\r\n" + STREAM.replace(b"\n", b"\r\n"), b": bye\n\n"]
    with serving(answers(*pieces)) as server:
        assert "".join(c.text for c in call(server.url, "stream_completion", "x", model="m")) == " snow☃"


def test_a_stream_without_usage_and_without_a_last_empty_line_is_whole(call: Call) -> None:
    with serving(answers(text_chunk("a"), text_chunk("b", "length").rstrip())) as server:
        chunks = call(server.url, "stream_completion", "x", model="m")
    assert [c.text for c in chunks] == ["a", "b"]
    assert all(c.usage is None for c in chunks)


@pytest.mark.parametrize(
    ("status", "content", "kind", "message"),
    [
        (
            400,
            {"error": {"message": "13 tokens,\n limit 8", "param": "prompt"}},
            api.BadRequestError,
            "13 tokens, limit 8",
        ),
        (422, {"detail": [{"msg": "field required"}]}, api.BadRequestError, "field required"),
        (401, {"error": "Unauthorized"}, api.AuthenticationError, "Unauthorized"),
        (404, {"error": {"message": "The model `x` does not exist."}}, api.NotFoundError, "`x` does not exist"),
        (500, b"Traceback ...", api.ServerError, "Traceback"),
        (502, b"", api.ServerError, "Because"),
        (418, b"<html>", api.APIStatusError, "<html>"),
    ],
)
@pytest.mark.parametrize("method", ["complete", "stream_completion"])
def test_an_error_has_the_servers_own_message_and_is_not_tried_again(
    call: Call, method: str, status: int, content: object, kind: type[api.APIStatusError], message: str
) -> None:
    with serving(whole(status, content)) as server, pytest.raises(kind, match=f"HTTP {status}: .*{message}") as raised:
        call(server.url, method, "x", model="x")
    assert raised.value.status_code == status
    assert len(server.seen) == 1


@pytest.mark.parametrize("method", ["complete", "stream_completion", "models"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_is_busy_is_asked_again_after_the_time_it_names(call: Call, method: str, status: int) -> None:
    async def handler(seen: Seen, answer: Answer) -> None:
        times.append(time.monotonic())
        if len(times) < 3:
            await answer.whole(status, {"error": {"message": "queue is full"}}, Retry_After="0.3")
        elif method == "complete":
            await answer.whole(200, {"choices": [{"index": 0, "text": "ok"}]})
        elif method == "models":
            await answer.whole(200, {"data": [{"id": "ok"}]})
        else:
            await answers(STREAM)(seen, answer)

    times: list[float] = []
    with serving(handler) as server:
        found = call(server.url, method) if method == "models" else call(server.url, method, "x", model="m")
    assert found
    gaps = [b - a for a, b in pairwise(times)]
    assert len(gaps) == 2
    assert all(0.28 < gap < 2 for gap in gaps)


@pytest.mark.parametrize(("retry_after", "requests"), [("0", 3), ("3600", 1)])
def test_it_gives_up_after_its_retries_or_at_once_where_the_wait_is_too_long(
    call: Call, retry_after: str, requests: int
) -> None:
    full = whole(503, {"error": {"message": "full"}}, Retry_After=retry_after)
    with serving(full) as server, pytest.raises(api.OverloadedError, match="HTTP 503: full") as raised:
        call(server.url, "complete", "x", model="m")
    assert raised.value.retry_after_s == float(retry_after)
    assert len(server.seen) == requests


def test_retry_after_may_be_a_date() -> None:
    soon = datetime.now(UTC) + timedelta(seconds=20)
    assert parse_retry_after(format_datetime(soon, usegmt=True)) == pytest.approx(20, abs=2)
    assert parse_retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert parse_retry_after("soon") is None


@pytest.mark.parametrize("after_headers", [False, True])
def test_a_stream_that_breaks_before_its_first_chunk_is_opened_again(call: Call, after_headers: bool) -> None:
    async def handler(seen: Seen, answer: Answer) -> None:
        tries.append(seen)
        if len(tries) == 1:
            if after_headers:
                await answer.start()
                await answer.write(b": hello\n\n")
            await answer.hang_up()
        else:
            await answers(STREAM)(seen, answer)

    tries: list[Seen] = []
    with serving(handler) as server:
        assert len(call(server.url, "stream_completion", "x", model="m")) == 3
    assert len(tries) == 2


def test_a_stream_that_breaks_after_its_first_chunk_is_not_tried_again(call: Call) -> None:
    async def handler(seen: Seen, answer: Answer) -> None:
        await answer.start()
        await answer.write(text_chunk("a"))
        await asyncio.sleep(0.1)
        await answer.hang_up()

    with serving(handler) as server, pytest.raises(api.APIConnectionError, match="broke"):
        call(server.url, "stream_completion", "x", model="m")
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([text_chunk("a"), event({"error": {"message": "the engine died", "code": 500}}), DONE], "the engine died"),
        ([text_chunk("a")], "ended before the answer did"),
        ([], "ended before the answer did"),
        ([b"data: {nonsense\n\n"], "no JSON object: '{nonsense'"),
        ([event([1])], "no JSON object"),
        ([event({"choices": ["a"]})], "no chunk of an answer"),
    ],
)
def test_a_stream_that_is_no_whole_answer_ends_in_a_stream_error(call: Call, pieces: list[bytes], message: str) -> None:
    with serving(answers(*pieces)) as server, pytest.raises(api.StreamError, match=message):
        call(server.url, "stream_completion", "x", model="m")
    assert len(server.seen) == 1


def test_what_came_before_an_error_in_the_stream_is_handed_out() -> None:
    with serving(answers(text_chunk("a") + event({"error": "out of memory"}))) as server, Client(server.url) as client:
        stream = client.stream_completion("x", model="m")
        assert next(stream).text == "a"
        with pytest.raises(api.StreamError, match="out of memory"):
            next(stream)


def test_nobody_at_the_address_is_a_connection_error_after_the_retries(call: Call) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(api.APIConnectionError, match="cannot be reached"):
            call(url, "models", settings={"retries": 1})
        assert call(url, "health") is False


@pytest.mark.parametrize("method", ["complete", "stream_completion"])
def test_a_silent_server_is_a_timeout_and_not_asked_again(call: Call, method: str) -> None:
    async def handler(seen: Seen, answer: Answer) -> None:
        await asyncio.sleep(2)

    with serving(handler) as server, pytest.raises(api.APITimeoutError, match="silent"):
        call(server.url, method, "x", model="m", settings={"timeout_s": 0.2})
    assert len(server.seen) == 1


def test_a_long_answer_with_short_silences_is_no_timeout(call: Call) -> None:
    pieces = [text_chunk("a")] * 8 + [text_chunk("b", "stop")]
    with serving(answers(*pieces, gap_s=0.1)) as server:
        found = call(server.url, "stream_completion", "x", model="m", settings={"timeout_s": 0.4})
    assert len(found) == 9


def test_chunks_are_handed_out_as_they_come() -> None:
    with serving(answers(text_chunk("a"), text_chunk("b", "stop"), gap_s=0.3)) as server, Client(server.url) as client:
        times = []
        for _ in client.stream_completion("x", model="m"):
            times.append(time.monotonic())
    assert times[1] - times[0] > 0.2


def test_leaving_a_stream_early_closes_its_connection(call: Call) -> None:
    gone = threading.Event()

    async def handler(seen: Seen, answer: Answer) -> None:
        await answer.start()
        try:
            while True:
                await answer.write(text_chunk("a"), gap_s=0.02)
        except ConnectionError:
            gone.set()
            raise

    async def leave(url: str) -> None:
        async with AsyncClient(url) as client:
            stream = client.stream_completion("x", model="m")
            await anext(stream)
            await stream.aclose()
            assert await asyncio.to_thread(gone.wait, 5)

    with serving(handler) as server:
        if call is async_call:
            asyncio.run(leave(server.url))
        else:
            with Client(server.url) as client:
                for _ in client.stream_completion("x", model="m"):
                    break
                assert gone.wait(5)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_address_may_end_in_v1_or_not_and_the_key_is_sent(call: Call, suffix: str) -> None:
    async def handler(seen: Seen, answer: Answer) -> None:
        pages = {
            "/v1/models": {"data": [{"id": "a"}, {"id": "b"}]},
            "/health": {},
            "/metrics": b"vllm:num_requests_running 3.0\n",
            "/tokenize": {"tokens": [5, 6], "count": 2},
            "/detokenize": {"prompt": "two words"},
        }
        await answer.whole(200, pages[seen.path])

    settings = {"api_key": "secret", "headers": {"X-Tenant": "a"}}
    with serving(handler) as server:
        url = server.url + suffix
        assert call(url, "models", settings=settings) == ["a", "b"]
        assert call(url, "health", settings=settings) is True
        assert call(url, "metrics", settings=settings) == "vllm:num_requests_running 3.0\n"
        assert call(url, "tokenize", "two words", model="a", settings=settings) == [5, 6]
        assert call(url, "detokenize", [5, 6], model="a", settings=settings) == "two words"
    assert {seen.headers["authorization"] for seen in server.seen} == {"Bearer secret"}
    assert {seen.headers["x-tenant"] for seen in server.seen} == {"a"}
    assert [seen.path for seen in server.seen] == ["/v1/models", "/health", "/metrics", "/tokenize", "/detokenize"]


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", ""])
def test_what_is_no_http_address_is_said_at_once(url: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match=r"write it as http://127\.0\.0\.1:8000"):
            kind(url)


def test_a_health_of_503_is_false_and_an_answer_that_is_none_a_stream_error(call: Call) -> None:
    with serving(whole(503, b"engine dead")) as server:
        assert call(server.url, "health") is False
    assert len(server.seen) == 1
    for method, args in (("complete", ("x",)), ("chat", (HI,)), ("tokenize", ("x",)), ("detokenize", ([1],))):
        with serving(whole(200, {"choices": []})) as server, pytest.raises(api.StreamError):
            call(server.url, method, *args, model="m")


def test_hundreds_of_streams_at_once_are_each_answered_with_their_own() -> None:
    async def handler(seen: Seen, answer: Answer) -> None:
        await answer.start()
        await answer.write(text_chunk(seen.body["prompt"]), text_chunk("!", "stop"), DONE, gap_s=0.05)
        await answer.end()

    async def main(url: str) -> list[str]:
        async with AsyncClient(url) as client:

            async def one(i: int) -> str:
                return "".join([c.text async for c in client.stream_completion(f"n{i}", model="m")])

            return await asyncio.gather(*map(one, range(300)))

    with serving(handler) as server:
        assert asyncio.run(main(server.url)) == [f"n{i}!" for i in range(300)]
    assert server.most_open > 200


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")} - {"close", "aclose"}

    assert methods(Client) == methods(AsyncClient)


def test_the_client_needs_none_of_the_engine() -> None:
    code = "import sys, runtime.client; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
