"""A small OpenAI-compatible server on real sockets, whose answers a test scripts down to the bytes of each write.

Written on asyncio streams rather than an HTTP framework: what the tests are about, half an event in one packet and a
connection that is cut in the middle of an answer, is what a framework does not let one do.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Seen:
    """A request as it came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class Answer:
    """Writes an answer. `whole` sends one with a length; `start`, `write` and `end` send one in pieces."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.cut = False

    async def whole(self, status: int, content: object, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        lines = [f"HTTP/1.1 {status} Because", f"content-length: {len(data)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self._writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        await self._writer.drain()

    async def start(self, content_type: str = "text/event-stream") -> None:
        self._writer.write(
            f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ntransfer-encoding: chunked\r\n\r\n".encode()
        )
        await self._writer.drain()

    async def write(self, *pieces: bytes, gap_s: float = 0.0) -> None:
        """Each piece is a write of its own, `gap_s` after the one before."""
        for piece in pieces:
            if gap_s:
                await asyncio.sleep(gap_s)
            self._writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            await self._writer.drain()

    async def end(self) -> None:
        self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()

    async def hang_up(self) -> None:
        """Cut the connection, whatever was sent so far."""
        self.cut = True
        self._writer.transport.abort()


Handler = Callable[[Seen, Answer], Awaitable[None]]


@dataclass
class FakeServer:
    """Where it listens, what came in, and how many requests are open now."""

    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    open: int = 0
    most_open: int = 0
    gone_away: int = 0

    def bodies(self, path: str) -> list[dict[str, Any]]:
        """The bodies that were posted to a path, in order."""
        return [seen.body for seen in self.seen if seen.path == path]


@contextmanager
def serving(handler: Handler) -> Iterator[FakeServer]:
    """A server in a thread of its own. What the handler does not answer is 404."""
    server = FakeServer()
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    stopping = asyncio.Event()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                seen = await _read(reader)
                server.seen.append(seen)
                server.open += 1
                server.most_open = max(server.most_open, server.open)
                answer = Answer(writer)
                try:
                    await handler(seen, answer)
                finally:
                    server.open -= 1
                if answer.cut:
                    return
        except asyncio.IncompleteReadError:
            pass
        except ConnectionError:
            server.gone_away += 1
        finally:
            writer.close()

    async def main() -> None:
        listening = await asyncio.start_server(connection, "127.0.0.1", 0, backlog=4096)
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        ready.set()
        await stopping.wait()
        listening.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join(10)


async def _read(reader: asyncio.StreamReader) -> Seen:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.rstrip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    content = await reader.readexactly(int(headers.get("content-length", 0)))
    return Seen(method, path, headers, json.loads(content) if content else {})


# What an OpenAI-compatible server says


def event(content: object) -> bytes:
    """A server-sent event of a JSON value."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def text_chunk(text: str, finish_reason: str | None = None, **more: Any) -> bytes:
    """A chunk of the completions API."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason, **more}
    return event({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]})


def chat_chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    """A chunk of the chat API."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return event(
        {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    )


def usage_chunk(prompt_tokens: int, completion_tokens: int, **more: Any) -> bytes:
    """The last chunk with the token counts."""
    total = prompt_tokens + completion_tokens
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total, **more}
    return event(
        {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "choices": [], "usage": usage}
    )


DONE = b"data: [DONE]\n\n"
