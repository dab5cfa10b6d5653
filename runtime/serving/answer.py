"""Sending an answer: a stream of events or one JSON, and what happens when the client goes away or time is up.

What a step adds to one client leaves in one write. Headers wait for the first piece of the answer, so that an error
before it is a status and not a broken stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Protocol

import msgspec
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from runtime.serving.errors import ApiError
from runtime.serving.generation import ClientGone, Delta, Generation, ReadAhead

LAST_WRITE_SECONDS = 2.0
"""How long the error that ends a stream may take to leave; a client that reads nothing does not get it."""

encode_json = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


def event(content: object) -> bytes:
    """One server-sent event."""
    return b"data: " + encode_json(content) + b"\n\n"


class Format(Protocol):
    """How an endpoint writes its answer."""

    def events(self, deltas: Sequence[Delta]) -> bytes:
        """The events of a stream for these pieces."""
        ...

    def last_events(self) -> bytes:
        """What comes after the last piece, before `[DONE]`."""
        ...

    def take(self, deltas: Sequence[Delta]) -> None:
        """Remember these pieces for `whole`."""
        ...

    def whole(self) -> bytes:
        """The JSON of the whole answer."""
        ...


class Answer(Response):
    """The answer to a request that generates. `timeout_s`: from now to its end; 0: no limit."""

    def __init__(self, generation: Generation, form: Format, *, stream: bool, timeout_s: float) -> None:
        self.generation = generation
        self.form = form
        self.stream = stream
        self.timeout_s = timeout_s
        self.background = None
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        try:
            async with asyncio.timeout(self.timeout_s or None):
                await (self._send_stream(send) if self.stream else self._send_whole(send))
        except ApiError as error:
            await self._send_error(error, scope, receive, send)
        except TimeoutError:
            text = f"the request took longer than the server's limit of {self.timeout_s:g} s; ask for fewer tokens"
            await self._send_error(ApiError(504, text), scope, receive, send)
        except (ClientGone, OSError):
            pass  # nobody is there to be answered
        finally:
            self.generation.give_up()
            watcher.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.generation.abandon()

    async def _send_stream(self, send: Send) -> None:
        if not any(prompt.params.stop for prompt in self.generation.prompts):
            await self._send_pieces(self.generation, send)
            return
        ahead = ReadAhead(self.generation)
        try:
            await self._send_pieces(ahead, send)
        finally:
            ahead.close()

    async def _send_pieces(self, pieces: Generation | ReadAhead, send: Send) -> None:
        finished = False
        while not finished:
            body = self.form.events(await pieces.next())
            finished = pieces.finished
            if finished:
                body += self.form.last_events() + DONE
            if not self._started:
                await self._start(send, b"text/event-stream; charset=utf-8")
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": not finished})

    async def _send_whole(self, send: Send) -> None:
        generation, form = self.generation, self.form
        while not generation.finished:
            form.take(await generation.next())
        body = form.whole()
        await self._start(send, b"application/json", len(body))
        await send({"type": "http.response.body", "body": body})

    async def _start(self, send: Send, content_type: bytes, length: int | None = None) -> None:
        headers = [(b"content-type", content_type)]
        if length is None:
            headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        else:
            headers.append((b"content-length", str(length).encode()))
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _send_error(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._started:
            await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)
            return
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(LAST_WRITE_SECONDS):
                await send({"type": "http.response.body", "body": event(error.body()) + DONE, "more_body": False})
