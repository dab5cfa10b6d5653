"""A client of OpenAI-compatible servers, ours or another: `Client` for plain code, `AsyncClient` for asyncio.

    with Client("http://127.0.0.1:8000") as client:
        model = client.models()[0]
        print(client.complete("The sky is", model=model, max_tokens=16).text)
        for chunk in client.stream_chat([{"role": "user", "content": "Hello"}], model=model):
            print(chunk.text, end="")

Both have the same methods and raise the same errors (`runtime.openai_wire.APIError` and its kinds). A request is tried
again where the connection could not be made or broke, or the answer was 429 or 503 (then after the time that it asked
for), and never once a piece of its answer has been handed out; so a server may do the work of one twice. A streamed one
is sent when its iteration begins, and closing that ends it.

They differ in the library below. `Client` has httpx2, `AsyncClient` aiohttp: with hundreds of requests at once httpx2's
pool takes 4 to 10 ms of a core for each, which a load generator does not have; aiohttp takes 1 to 2.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import httpx2
import tenacity

from runtime import openai_wire as wire
from runtime.openai_wire import (
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    Chunk,
    Completion,
    Messages,
    NotFoundError,
    OverloadedError,
    Prompt,
    ServerError,
    StreamError,
    Usage,
)

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIStatusError",
    "APITimeoutError",
    "AsyncClient",
    "AuthenticationError",
    "BadRequestError",
    "Chunk",
    "Client",
    "Completion",
    "NotFoundError",
    "OverloadedError",
    "ServerError",
    "StreamError",
    "Usage",
]

T = TypeVar("T")
_Opened = tuple[httpx2.Response, Iterator[Chunk], Chunk | None]
_AsyncOpened = tuple[aiohttp.ClientResponse, AsyncIterator[Chunk], Chunk | None]

TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 10.0
LONGEST_WAIT_S = 60.0
"""Of a Retry-After: who is asked to wait longer gets the error instead."""
KEEP_ALIVE_S = 4.0
"""How long an idle connection is kept: less than uvicorn's 5 s, so that it is never closed while a request sets out."""


class _Settings:
    """What both clients are made with.

    Args:
        base_url: the server's address, with or without `/v1`.
        api_key: sent as a bearer token.
        timeout_s: longest silence of the server, in seconds, before and within an answer.
        retries: how often a request is tried again.
        headers: sent with every request.

    Raises ValueError for what is no http address.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        retries: int = 2,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.root = wire.root_url(base_url)
        self._headers = wire.request_headers(api_key, headers)
        self._timeout_s = timeout_s
        self._retries = retries
        self._retrying: dict[str, Any] = {
            "stop": tenacity.stop_after_attempt(1 + retries),
            "retry": tenacity.retry_if_exception(_worth_retrying),
            "wait": _wait_s,
            "before_sleep": tenacity.before_sleep_log(logging.getLogger(__name__), logging.INFO),
            "reraise": True,
        }


def _worth_retrying(error: BaseException) -> bool:
    if isinstance(error, OverloadedError):
        return (error.retry_after_s or 0) <= LONGEST_WAIT_S
    return isinstance(error, APIConnectionError)


def _wait_s(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.retry_after_s if isinstance(error, OverloadedError) else None
    return _backoff_s(state) if asked is None else asked


_backoff_s = tenacity.wait_random_exponential(multiplier=0.5, max=8)


class Client(_Settings):
    """A synchronous client; see the module. May be shared by threads. Close it, or use it as a context manager."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        timeout = httpx2.Timeout(self._timeout_s, connect=CONNECT_TIMEOUT_S)
        limits = httpx2.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_S)
        # The address that was given is asked itself, whatever proxy the environment names; so does aiohttp.
        self._http = httpx2.Client(headers=self._headers, timeout=timeout, limits=limits, trust_env=False)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def complete(self, prompt: Prompt, *, model: str, **params: Any) -> Completion:
        """Complete a prompt (text or token ids). `params`: further fields of the body, such as max_tokens. APIError."""
        return wire.parse_completion(self.post(wire.COMPLETIONS, wire.completion_body(prompt, model, params, False)))

    def chat(self, messages: Messages, *, model: str, **params: Any) -> Completion:
        """Answer a conversation, `{"role": ..., "content": ...}` each. APIError."""
        return wire.parse_completion(self.post(wire.CHAT, wire.chat_body(messages, model, params, False)))

    def stream_completion(self, prompt: Prompt, *, model: str, **params: Any) -> Iterator[Chunk]:
        """`complete`, in chunks as they come. APIError."""
        return self.stream(wire.COMPLETIONS, wire.completion_body(prompt, model, params, True))

    def stream_chat(self, messages: Messages, *, model: str, **params: Any) -> Iterator[Chunk]:
        """`chat`, in chunks as they come. APIError."""
        return self.stream(wire.CHAT, wire.chat_body(messages, model, params, True))

    def models(self) -> list[str]:
        """Ids of the models that are served. APIError."""
        return wire.parse_models(self.get("/v1/models"))

    def health(self) -> bool:
        """Whether the server says that it can serve: asked once, False also where nobody answers."""
        try:
            self._whole("GET", "/health")
        except APIError:
            return False
        return True

    def metrics(self) -> str:
        """The server's metrics, in Prometheus' text format. APIError."""
        return self.get("/metrics").decode("utf-8", "replace")

    def tokenize(self, text: str, *, model: str) -> list[int]:
        """Token ids of a text, without special tokens, by the server's tokenizer (vLLM's `/tokenize`). APIError."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        return wire.parse_tokens(self.post("/tokenize", body))

    def detokenize(self, tokens: list[int], *, model: str) -> str:
        """Text of token ids, by the server's tokenizer (vLLM's `/detokenize`). APIError."""
        return wire.parse_text(self.post("/detokenize", {"model": model, "tokens": tokens}))

    # What they are made of

    def get(self, path: str) -> bytes:
        """Content of an answer to GET. APIError."""
        return self._retried(self._whole, "GET", path)

    def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """Content of an answer to POST of a JSON body. APIError."""
        return self._retried(self._whole, "POST", path, json.dumps(body).encode())

    def stream(
        self, path: str, body: Mapping[str, Any] | bytes, headers: Mapping[str, str] | None = None
    ) -> Iterator[Chunk]:
        """Chunks of an answer to POST of a body that asks for a stream (bytes: JSON already). APIError."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response, chunks, first = self._retried(self._open, path, content, headers)
        try:
            if first is not None:
                yield first
                yield from chunks
        finally:
            response.close()

    def _retried(self, ask: Callable[..., T], *args: Any) -> T:
        return tenacity.Retrying(**self._retrying)(ask, *args)

    def _whole(self, method: str, path: str, content: bytes | None = None) -> bytes:
        with _explained(self.root):
            response = self._http.request(method, self.root + path, content=content)
        return _checked(response.status_code, response.reason_phrase, response.headers, response.content)

    def _open(self, path: str, content: bytes, headers: Mapping[str, str] | None) -> _Opened:
        """Send, and wait for the first chunk: as long as there is none, all of it may be tried again."""
        with _explained(self.root):
            request = self._http.build_request("POST", self.root + path, content=content, headers=dict(headers or {}))
            response = self._http.send(request, stream=True)
        try:
            if response.status_code != 200:
                with _explained(self.root):
                    content = response.read()
                _checked(response.status_code, response.reason_phrase, response.headers, content)
            chunks = self._chunks(response)
            return response, chunks, next(chunks, None)
        except BaseException:
            response.close()
            raise

    def _chunks(self, response: httpx2.Response) -> Iterator[Chunk]:
        stream = wire.ChunkStream()
        pieces = response.iter_bytes()
        while True:
            with _explained(self.root):
                piece = next(pieces, None)
            if piece is None:
                break
            yield from stream.feed(piece)
        yield from stream.end()


class AsyncClient(_Settings):
    """An asynchronous client; see the module. For one event loop. Close it, or use it as a context manager."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._session: aiohttp.ClientSession | None = None

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def complete(self, prompt: Prompt, *, model: str, **params: Any) -> Completion:
        """Complete a prompt (text or token ids). `params`: further fields of the body, such as max_tokens. APIError."""
        return wire.parse_completion(
            await self.post(wire.COMPLETIONS, wire.completion_body(prompt, model, params, False))
        )

    async def chat(self, messages: Messages, *, model: str, **params: Any) -> Completion:
        """Answer a conversation, `{"role": ..., "content": ...}` each. APIError."""
        return wire.parse_completion(await self.post(wire.CHAT, wire.chat_body(messages, model, params, False)))

    def stream_completion(self, prompt: Prompt, *, model: str, **params: Any) -> AsyncGenerator[Chunk, None]:
        """`complete`, in chunks as they come. APIError."""
        return self.stream(wire.COMPLETIONS, wire.completion_body(prompt, model, params, True))

    def stream_chat(self, messages: Messages, *, model: str, **params: Any) -> AsyncGenerator[Chunk, None]:
        """`chat`, in chunks as they come. APIError."""
        return self.stream(wire.CHAT, wire.chat_body(messages, model, params, True))

    async def models(self) -> list[str]:
        """Ids of the models that are served. APIError."""
        return wire.parse_models(await self.get("/v1/models"))

    async def health(self) -> bool:
        """Whether the server says that it can serve: asked once, False also where nobody answers."""
        try:
            await self._whole("GET", "/health")
        except APIError:
            return False
        return True

    async def metrics(self) -> str:
        """The server's metrics, in Prometheus' text format. APIError."""
        return (await self.get("/metrics")).decode("utf-8", "replace")

    async def tokenize(self, text: str, *, model: str) -> list[int]:
        """Token ids of a text, without special tokens, by the server's tokenizer (vLLM's `/tokenize`). APIError."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        return wire.parse_tokens(await self.post("/tokenize", body))

    async def detokenize(self, tokens: list[int], *, model: str) -> str:
        """Text of token ids, by the server's tokenizer (vLLM's `/detokenize`). APIError."""
        return wire.parse_text(await self.post("/detokenize", {"model": model, "tokens": tokens}))

    # What they are made of

    async def get(self, path: str) -> bytes:
        """Content of an answer to GET. APIError."""
        return await self._retried(self._whole, "GET", path)

    async def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """Content of an answer to POST of a JSON body. APIError."""
        return await self._retried(self._whole, "POST", path, json.dumps(body).encode())

    async def stream(
        self, path: str, body: Mapping[str, Any] | bytes, headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """Chunks of an answer to POST of a body that asks for a stream (bytes: JSON already). APIError."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response, chunks, first = await self._retried(self._open, path, content, headers)
        try:
            if first is not None:
                yield first
                async for chunk in chunks:
                    yield chunk
        finally:
            response.close()  # which gives the connection back where the answer was read to its end

    async def _retried(self, ask: Callable[..., Awaitable[T]], *args: Any) -> T:
        if not self._retries:  # a load generator asks once, and has no 0.2 ms for the machinery
            return await ask(*args)
        return await tenacity.AsyncRetrying(**self._retrying)(ask, *args)

    async def _whole(self, method: str, path: str, content: bytes | None = None) -> bytes:
        with _explained(self.root):
            async with self._http.request(method, self.root + path, data=content) as response:
                answer = await response.read()
        return _checked(response.status, response.reason, response.headers, answer)

    async def _open(self, path: str, content: bytes, headers: Mapping[str, str] | None) -> _AsyncOpened:
        """Send, and wait for the first chunk: as long as there is none, all of it may be tried again."""
        with _explained(self.root):
            response = await self._http.post(self.root + path, data=content, headers=headers)
        try:
            if response.status != 200:
                with _explained(self.root):
                    content = await response.read()
                _checked(response.status, response.reason, response.headers, content)
            chunks = self._chunks(response)
            return response, chunks, await anext(chunks, None)
        except BaseException:
            response.close()
            raise

    async def _chunks(self, response: aiohttp.ClientResponse) -> AsyncIterator[Chunk]:
        stream = wire.ChunkStream()
        while True:
            with _explained(self.root):
                piece = await response.content.readany()
            if not piece:
                break
            for chunk in stream.feed(piece):
                yield chunk
        for chunk in stream.end():
            yield chunk

    @property
    def _http(self) -> aiohttp.ClientSession:
        """Made at its first use: it belongs to the event loop that runs then."""
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=self._timeout_s)
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)
        return self._session


@contextmanager
def _explained(root: str) -> Iterator[None]:
    """What either library raises, as an error of ours."""
    try:
        yield
    except (aiohttp.ConnectionTimeoutError, httpx2.ConnectTimeout) as error:
        raise APIConnectionError(f"{root} does not take the connection within {CONNECT_TIMEOUT_S:g} s") from error
    except (TimeoutError, httpx2.TimeoutException) as error:
        raise APITimeoutError(f"{root} was silent for too long") from error
    except (aiohttp.ClientConnectorError, httpx2.ConnectError) as error:
        raise APIConnectionError(f"{root} cannot be reached: {_reason(error)}") from error
    except (aiohttp.ClientError, httpx2.HTTPError, OSError) as error:
        raise APIConnectionError(f"the connection to {root} broke: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _checked(status: int, reason: str | None, headers: Mapping[str, str], content: bytes) -> bytes:
    """The content of an answer, if it is one. Raises APIStatusError."""
    if status != 200:
        raise wire.status_error(status, reason or "", headers.get("retry-after"), content)
    return content
