"""One engine, as the front has it: started, fed, listened to, and buried. Where it is, its `Link` knows."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from runtime.engine_stats import EngineStats
from runtime.serving import messages
from runtime.serving.engine_client import (
    Call,
    CommandFailed,
    EngineClient,
    EngineGone,
    EngineStartError,
    EngineView,
    Prompt,
    Sink,
)
from runtime.serving.heartbeat import TIMEOUT_SECONDS, Heartbeat
from runtime.serving.link import Link
from runtime.serving.messages import EngineInfo, TokenOutput

logger = logging.getLogger(__name__)


class EngineProxy(EngineClient):
    """One engine at the other end of a link. Make it with `start`, end it with `close`.

    heartbeat_timeout_s: seconds of silence after which the engine counts as dead (`runtime.serving.heartbeat`).
    """

    def __init__(self, link: Link, heartbeat_timeout_s: float = TIMEOUT_SECONDS) -> None:
        self.stats = EngineStats()
        self._link = link
        self._error: str | None = None
        self._closed = False
        self._next_id = 0
        self._sinks: dict[int, Sink] = {}
        self._queued: dict[int, int] = {}  # request -> prompt tokens, until its first output
        self._queued_tokens = 0
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count()
        self._heartbeat = Heartbeat(heartbeat_timeout_s, lambda: self._send(messages.Ping()))
        self._watching: asyncio.Task[None] | None = None
        self._info: EngineInfo
        self._ready: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()

    @classmethod
    async def start(cls, link: Link, heartbeat_timeout_s: float = TIMEOUT_SECONDS) -> EngineProxy:
        """Open the link and wait until the engine takes requests. Raises EngineStartError."""
        client = cls(link, heartbeat_timeout_s)
        client._watching = asyncio.create_task(client._watch())
        try:
            await link.open(client._receive, client._die)
            client._info = await client._ready
        except BaseException:
            await client.close()
            raise
        return client

    # What the handlers see

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def engines(self) -> Sequence[EngineView]:
        state = "serving" if self._error is None else "dead"
        return [EngineView(0, self._info, self.stats, state, self._error)]

    @property
    def error(self) -> str | None:
        return self._error

    @property
    def num_queued(self) -> tuple[int, int]:
        return len(self._queued), self._queued_tokens

    @property
    def num_live(self) -> int:
        return len(self._sinks)

    def submit(self, prompts: Sequence[Prompt]) -> Call:
        call = Call()
        for prompt in prompts:
            first_id = self.hand_in(prompt, call)
            call.request_ids += range(first_id, first_id + prompt.params.n)
        return call

    def hand_in(self, prompt: Prompt, sink: Sink) -> int:
        """One prompt's continuations, their outputs to `sink`. Returns the id of the first; the others follow it.

        Raises EngineGone.
        """
        if self._error is not None:
            raise EngineGone(self._error)
        first_id, n = self._next_id, prompt.params.n
        self._next_id += n
        self._send(messages.Submit(first_id, prompt.token_ids, prompt.params, prompt.details))
        for request_id in range(first_id, first_id + n):
            self._sinks[request_id] = sink
            self._queued[request_id] = len(prompt.token_ids)
        self._queued_tokens += n * len(prompt.token_ids)
        return first_id

    def cancel(self, call: Call) -> None:
        self.cancel_requests(call.request_ids)

    def cancel_requests(self, request_ids: Sequence[int]) -> None:
        """Nobody waits for these any more; those that have ended are left out."""
        live = [request_id for request_id in request_ids if self._forget(request_id)]
        if live and self._error is None:
            self._send(messages.Cancel(live))

    def stop(self, request_id: int, num_output_tokens: int) -> None:
        if self._forget(request_id) and self._error is None:
            self._send(messages.Stop(request_id, num_output_tokens))

    def fail_all(self, reason: str) -> None:
        sinks = dict.fromkeys(self._sinks.values())
        self.cancel_requests(list(self._sinks))
        for sink in sinks:
            sink.fail(EngineGone(reason))

    async def command(self, name: str, arguments: dict[str, Any]) -> Any:
        if self._error is not None:
            raise EngineGone(self._error)
        call_id = next(self._call_ids)
        reply = self._replies[call_id] = asyncio.get_running_loop().create_future()
        self._send(messages.Admin(call_id, name, arguments))
        result = await reply
        if name == "change_policies":
            self._info = replace(self._info, stack=result["stack"])
        return result

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._watching is not None:
            self._watching.cancel()
        ready = self._ready.done() and not self._ready.cancelled() and self._ready.exception() is None
        await self._link.close(messages.encode(messages.Shutdown()) if ready else None)
        self._die("the server is shutting down")

    # What comes from the engine

    def _send(self, message: messages.ToEngine) -> None:
        self._link.send(messages.encode(message))

    async def _watch(self) -> None:
        await self._heartbeat.stops()
        self._die(f"the engine has given no sign of life for {self._heartbeat.timeout_s:g} s")
        self._link.kill()

    def _receive(self, data: bytes) -> None:
        self._heartbeat.heard()
        if self._error is not None:
            return  # nobody waits any more
        try:
            self._take(messages.decode_from_engine(data))
        except Exception:
            logger.exception("a message of the engine could not be taken")
            self._die("the engine's answers cannot be read")

    def _take(self, message: messages.FromEngine) -> None:
        if isinstance(message, messages.StepOutputs):
            self.stats = message.stats
            now = time.monotonic()
            for output in message.outputs:
                self._hand_out(output, now)
        elif isinstance(message, messages.AdminReply):
            reply = self._replies.pop(message.call_id, None)  # None: it came after the news of the death
            if reply is not None and not reply.done():
                if message.error is None:
                    reply.set_result(message.result)
                else:
                    reply.set_exception(CommandFailed(message.error))
        elif isinstance(message, messages.Ready):
            self._ready.set_result(message.info)
        elif isinstance(message, messages.Stopped | messages.Failed):
            self._die(message.reason)

    def _hand_out(self, output: TokenOutput, now: float) -> None:
        request_id = output.request_id
        sink = self._sinks.get(request_id)
        if sink is None:
            return  # cancelled, or stopped by its text, while this was on its way
        if output.finish_reason is not None:
            self._forget(request_id)
        else:
            self._queued_tokens -= self._queued.pop(request_id, 0)
        sink.put(now, output)

    def _forget(self, request_id: int) -> bool:
        """Take a request off the books; False if it was not on them."""
        self._queued_tokens -= self._queued.pop(request_id, 0)
        return self._sinks.pop(request_id, None) is not None

    def _die(self, reason: str) -> None:
        if self._error is None:
            self._error = reason
        if not self._ready.done():
            self._ready.set_exception(EngineStartError(self._error))
            self._ready.exception()  # nobody may be waiting for it
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(EngineGone(self._error))
        self._replies.clear()
        sinks = dict.fromkeys(self._sinks.values())
        self._sinks.clear()
        self._queued.clear()
        self._queued_tokens = 0
        for sink in sinks:
            sink.fail(EngineGone(self._error))
