"""What goes over the wire between a client and an OpenAI-compatible server, without any I/O.

Requests as bodies; answers as `Completion`, `Chunk` and errors. Shared by the synchronous and the asynchronous client.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


# Errors


class APIError(Exception):
    """Anything that a request to a server can end in but an answer. The message is one line."""


class APIConnectionError(APIError):
    """The server could not be reached, or the connection broke before the answer was whole."""


class APITimeoutError(APIError):
    """The server was silent for longer than the client waits."""


class StreamError(APIError):
    """What came is no answer of an OpenAI-compatible server, says itself that it failed, or ended half-way."""


class APIStatusError(APIError):
    """The server answered with an HTTP status other than 200.

    Attributes:
        status_code: the HTTP status.
        body: the `error` object of the answer (`message`, `type`, `param`, `code`), as far as there was one.
        retry_after_s: seconds after which the server wants to be asked again, if it said so.
    """

    def __init__(self, status_code: int, message: str, body: Mapping[str, Any], retry_after_s: float | None) -> None:
        super().__init__(f"HTTP {status_code}: {message}")
        self.status_code = status_code
        self.body = dict(body)
        self.retry_after_s = retry_after_s


class BadRequestError(APIStatusError):
    """400, 413, 422: the request is one that the server cannot serve."""


class AuthenticationError(APIStatusError):
    """401, 403: the API key is missing or not allowed to do this."""


class NotFoundError(APIStatusError):
    """404: no such model or endpoint."""


class OverloadedError(APIStatusError):
    """429, 503: not now; the same request may be served later."""


class ServerError(APIStatusError):
    """Any other 5xx: the server failed."""


_ERRORS: dict[int, type[APIStatusError]] = {
    **dict.fromkeys((400, 413, 422), BadRequestError),
    **dict.fromkeys((401, 403), AuthenticationError),
    404: NotFoundError,
    **dict.fromkeys((429, 503), OverloadedError),
}


def status_error(status_code: int, reason: str, retry_after: str | None, content: bytes) -> APIStatusError:
    """The error that an answer other than 200 stands for, with the server's own message where it gave one."""
    text = content.decode("utf-8", "replace").strip()
    body: Mapping[str, Any] = {}
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = None
    if isinstance(parsed, dict):
        found = parsed.get("error", parsed.get("detail", parsed))  # FastAPI says `detail`
        body = found if isinstance(found, dict) else {"message": found}
    message = body.get("message") or text or reason or "no reason given"
    kind = _ERRORS.get(status_code, ServerError if status_code >= 500 else APIStatusError)
    return kind(status_code, " ".join(str(message).split())[:500], body, parse_retry_after(retry_after))


def parse_retry_after(value: str | None) -> float | None:
    """Seconds from now of a Retry-After header, which is a number or a date; None where it says nothing."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


# Requests


def root_url(base_url: str) -> str:
    """The server's address without a trailing slash or `/v1`. Raises ValueError for what is no http address."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{base_url!r} is no server's address; write it as http://127.0.0.1:8000")
    return base_url.rstrip("/").removesuffix("/v1").rstrip("/")


def request_headers(api_key: str | None, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The headers of every request."""
    key = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    return {"Content-Type": "application/json", **key, **(more or {})}


def completion_body(prompt: Prompt, model: str, params: Mapping[str, Any], stream: bool) -> dict[str, Any]:
    """The body of a request to `COMPLETIONS`. The prompt is text or token ids."""
    given = prompt if isinstance(prompt, str) else list(prompt)
    return {"model": model, "prompt": given, **params, **(STREAMED if stream else {})}


def chat_body(messages: Messages, model: str, params: Mapping[str, Any], stream: bool) -> dict[str, Any]:
    """The body of a request to `CHAT`."""
    return {"model": model, "messages": list(messages), **params, **(STREAMED if stream else {})}


STREAMED: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
"""What a body says to get its answer as a stream, with the token counts at the end."""


# Answers


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the server counts them. `cached_tokens`: prefix hit of the prompt; None if it does not say."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer. `logprobs` is as the server sent it, in the form of its API; None where none were asked for."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer, of the completions or the chat API."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage | None

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed answer.

    Attributes:
        index: which choice it belongs to; None for a chunk that has only the usage.
        text: what it adds to the text; may be empty (a special token, or part of a character).
        finish_reason: on a choice's last chunk: `stop`, `length`, ...
        logprobs: as the server sent them.
        usage: token counts: on the last chunk of a stream, or on each if the server counts as it goes.
        has_output: it carries generated tokens, as `vllm bench serve` counts them: in the completions API every chunk
            with a choice, in the chat API one whose delta has content, reasoning or a tool call (a role is none).
    """

    index: int | None
    text: str
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None
    usage: Usage | None = None
    has_output: bool = False


def parse_completion(content: bytes) -> Completion:
    """The answer to a request that was not streamed. Raises StreamError."""
    answer = parse_object(content)
    try:
        choices = tuple(
            Choice(c.get("index", 0), _text_of(c), c.get("finish_reason"), c.get("logprobs")) for c in answer["choices"]
        )
        if choices:
            return Completion(answer.get("id", ""), answer.get("model", ""), choices, _usage(answer.get("usage")))
    except (KeyError, TypeError, AttributeError):
        pass
    raise StreamError(f"the server's answer has no choices: {_shown(content)}")


def parse_models(content: bytes) -> list[str]:
    """The ids of the models that a server serves. Raises StreamError."""
    try:
        return [str(model["id"]) for model in parse_object(content)["data"]]
    except (KeyError, TypeError):
        raise StreamError(f"the server's answer is no list of models: {_shown(content)}") from None


def parse_tokens(content: bytes) -> list[int]:
    """Token ids that a server made of a text. Raises StreamError."""
    tokens = parse_object(content).get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise StreamError(f"the server's answer has no tokens: {_shown(content)}")
    return tokens


def parse_text(content: bytes) -> str:
    """The text that a server made of token ids. Raises StreamError."""
    answer = parse_object(content)
    text = answer.get("prompt", answer.get("text"))
    if not isinstance(text, str):
        raise StreamError(f"the server's answer has no text: {_shown(content)}")
    return text


def parse_object(content: bytes) -> dict[str, Any]:
    """A JSON object that a server sent. Raises StreamError for anything else."""
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise StreamError(f"the server sent what is no JSON object: {_shown(content)}")
    return answer


class ChunkStream:
    """Bytes of a streamed answer in, chunks out, wherever the bytes are cut.

    Server-sent events as servers of the OpenAI API write them: `data: {...}` and an empty line; comments and other
    fields are skipped, `[DONE]` ends the stream. Bytes are decoded once an event is whole, so that no character is cut.
    """

    def __init__(self) -> None:
        self._pending = b""
        self._data: list[bytes] = []
        self._finished: set[int] = set()
        self._open: set[int] = set()
        self.done = False

    def feed(self, content: bytes) -> Iterator[Chunk]:
        """The chunks that are whole with these bytes. Raises StreamError for an error that the server reports."""
        *lines, self._pending = (self._pending + content).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].strip())
            elif not line and self._data:
                data, self._data = b"\n".join(self._data), []
                yield from self._event(data)

    def end(self) -> Iterator[Chunk]:
        """The connection is at its end: what is left. Raises StreamError where the answer is not whole."""
        yield from self.feed(b"\n\n")  # some servers leave out the last empty line
        if not self.done and (self._open - self._finished or not self._finished):
            raise StreamError("the stream ended before the answer did")

    def _event(self, data: bytes) -> Iterator[Chunk]:
        if self.done:
            return
        if data == b"[DONE]":
            self.done = True
            return
        event = parse_object(data)
        if event.get("error"):
            error = event["error"]
            message = error.get("message", error) if isinstance(error, dict) else error
            raise StreamError(f"the server ended the stream with an error: {' '.join(str(message).split())[:500]}")
        usage = _usage(event.get("usage"))
        choices = event.get("choices") or ()
        try:
            for choice in choices:
                yield self._chunk(choice, usage)
        except (AttributeError, TypeError):
            raise StreamError(f"the server sent what is no chunk of an answer: {_shown(data)}") from None
        if not choices and usage is not None:
            yield Chunk(None, "", usage=usage)

    def _chunk(self, choice: dict[str, Any], usage: Usage | None) -> Chunk:
        index, finish_reason = choice.get("index", 0), choice.get("finish_reason")
        self._open.add(index)
        if finish_reason is not None:
            self._finished.add(index)
        delta = choice.get("delta")
        has_output = True if delta is None else any(delta.get(part) for part in _OUTPUT)
        return Chunk(index, _text_of(choice), finish_reason, choice.get("logprobs"), usage, has_output)


_OUTPUT = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")
"""Parts of a chat answer that are generated."""


def _text_of(choice: dict[str, Any]) -> str:
    part = choice.get("delta") or choice.get("message")
    return (choice.get("text") if part is None else part.get("content")) or ""


def _usage(usage: dict[str, Any] | None) -> Usage | None:
    if not usage:
        return None
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return Usage(usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0, cached)


def _shown(content: bytes) -> str:
    return repr(content[:200].decode("utf-8", "replace"))
