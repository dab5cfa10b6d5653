"""The front's side of an engine process: starts it, sends requests, and hands each step's outputs to who waits.

`EngineClient` is all that the HTTP handlers know of an engine, so what implements it may as well be several engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from runtime.engine_stats import EngineStats
from runtime.sampling.params import SamplingParams
from runtime.sequence import Details
from runtime.serving import messages
from runtime.serving.engine_process import Launch, run_engine_process
from runtime.serving.messages import EngineInfo, TokenOutput

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 20.0
"""How long an engine process may take to end (it closes its record) before it is killed."""

LAST_WORDS_SECONDS = 0.5
"""How long the last message of a process that has ended may be on its way."""


class EngineStartError(RuntimeError):
    """The engine did not start; the message is one line that says why."""


class EngineGone(RuntimeError):
    """No engine answers: it has died, or the server is shutting down."""


class CommandFailed(ValueError):
    """An operator's command was refused by the engine; nothing has changed."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in tokens, with how it is sampled; `params.stop` is the front's own affair and not sent."""

    token_ids: list[int]
    params: SamplingParams
    details: Details


class Call:
    """The requests of one HTTP request, and their outputs as they come: `await next()` takes all that is there."""

    def __init__(self) -> None:
        self.request_ids: list[int] = []
        """Of every continuation of every prompt, in order."""
        self._arrived: list[tuple[float, TokenOutput]] = []
        self._failure: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def next(self) -> list[tuple[float, TokenOutput]]:
        """(when it was received, output), at least one. Raises what the call has failed with, if it has."""
        if not self._arrived and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._arrived:
            arrived, self._arrived = self._arrived, []
            return arrived
        assert self._failure is not None
        raise self._failure

    def put(self, received_at: float, output: TokenOutput) -> None:
        """An output for one of the requests. Who waits is woken once all outputs of the step have been put."""
        self._arrived.append((received_at, output))
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Nothing more comes. What has arrived can still be taken."""
        self._failure = self._failure or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient(ABC):
    """What serves token ids: requests go in, outputs come back to their `Call`."""

    info: EngineInfo
    stats: EngineStats

    @property
    @abstractmethod
    def error(self) -> str | None:
        """Why nothing is served any more; None while all is well."""

    @property
    @abstractmethod
    def num_queued(self) -> tuple[int, int]:
        """Requests that wait for their first token, and the prompt tokens of these."""

    @property
    @abstractmethod
    def num_live(self) -> int:
        """Requests that have not ended."""

    @abstractmethod
    def submit(self, prompts: Sequence[Prompt]) -> Call:
        """Hand in prompts, each with its `params.n` continuations. Raises EngineGone."""

    @abstractmethod
    def cancel(self, call: Call) -> None:
        """Nobody waits for these requests any more."""

    @abstractmethod
    def stop(self, request_id: int, num_output_tokens: int) -> None:
        """This request's text has ended; it gets no more outputs."""

    @abstractmethod
    def fail_all(self, reason: str) -> None:
        """End every call with EngineGone."""

    @abstractmethod
    async def command(self, name: str, arguments: dict[str, Any]) -> Any:
        """Have an operator's command carried out. Raises CommandFailed or EngineGone."""


class EngineProcess(EngineClient):
    """One engine in a process of its own. Make it with `start`, end it with `close`."""

    def __init__(self) -> None:
        self.stats = EngineStats()
        self._error: str | None = None
        self._next_id = 0
        self._calls: dict[int, Call] = {}
        self._queued: dict[int, int] = {}  # request -> prompt tokens, until its first output
        self._queued_tokens = 0
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count()
        self._ready: asyncio.Future[EngineInfo]
        self._folder = tempfile.TemporaryDirectory(prefix="diptych-", ignore_cleanup_errors=True)
        self._context = zmq.asyncio.Context()
        self._outbound: zmq.Socket[bytes] = zmq.Socket(self._context, zmq.PUSH)
        self._inbound = self._context.socket(zmq.PULL)

    @classmethod
    async def start(cls, launch: Launch) -> EngineProcess:
        """Start the process and wait until it takes requests. Raises EngineStartError."""
        client = cls()
        try:
            await client._start(launch)
        except BaseException:
            await client.close()
            raise
        return client

    async def _start(self, launch: Launch) -> None:
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        commands, outputs = (f"ipc://{Path(self._folder.name) / name}" for name in ("commands", "outputs"))
        for socket, address in ((self._outbound, commands), (self._inbound, outputs)):
            socket.set_hwm(0)
            socket.bind(address)
        self._process = multiprocessing.get_context("spawn").Process(
            target=run_engine_process, args=(commands, outputs, launch), name="diptych-engine", daemon=True
        )
        self._process.start()
        loop.add_reader(self._process.sentinel, self._on_death)
        self._reader = asyncio.create_task(self._read())
        self.info = await self._ready

    # What the handlers see

    @property
    def error(self) -> str | None:
        return self._error

    @property
    def num_queued(self) -> tuple[int, int]:
        return len(self._queued), self._queued_tokens

    @property
    def num_live(self) -> int:
        return len(self._calls)

    @property
    def pid(self) -> int | None:
        """Of the engine's process."""
        return self._process.pid

    def submit(self, prompts: Sequence[Prompt]) -> Call:
        if self._error is not None:
            raise EngineGone(self._error)
        call = Call()
        for prompt in prompts:
            first_id, n = self._next_id, prompt.params.n
            self._next_id += n
            self._send(messages.Submit(first_id, prompt.token_ids, prompt.params, prompt.details))
            for request_id in range(first_id, first_id + n):
                call.request_ids.append(request_id)
                self._calls[request_id] = call
                self._queued[request_id] = len(prompt.token_ids)
            self._queued_tokens += n * len(prompt.token_ids)
        return call

    def cancel(self, call: Call) -> None:
        live = [request_id for request_id in call.request_ids if self._forget(request_id)]
        if live and self._error is None:
            self._send(messages.Cancel(live))

    def stop(self, request_id: int, num_output_tokens: int) -> None:
        if self._forget(request_id) and self._error is None:
            self._send(messages.Stop(request_id, num_output_tokens))

    def fail_all(self, reason: str) -> None:
        for call in dict.fromkeys(self._calls.values()):
            self.cancel(call)
            call.fail(EngineGone(reason))

    async def command(self, name: str, arguments: dict[str, Any]) -> Any:
        if self._error is not None:
            raise EngineGone(self._error)
        call_id = next(self._call_ids)
        reply = self._replies[call_id] = asyncio.get_running_loop().create_future()
        self._send(messages.Admin(call_id, name, arguments))
        result = await reply
        if name == "swap":
            self.info = replace(self.info, stack=result["stack"])
        return result

    async def close(self) -> None:
        """End the engine; its record is closed. Whoever still waits gets EngineGone. A second call does nothing."""
        process = getattr(self, "_process", None)
        if process is not None and process.is_alive():
            self._send(messages.Shutdown())
            await asyncio.to_thread(process.join, CLOSE_SECONDS)
            if process.is_alive():
                logger.warning("the engine process does not end; it is killed")
                process.kill()
                await asyncio.to_thread(process.join)
        self._die("the server is shutting down")
        if process is not None:
            asyncio.get_running_loop().remove_reader(process.sentinel)
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        self._outbound.close(linger=0)
        self._inbound.close(linger=0)
        self._context.term()
        self._folder.cleanup()

    # What comes from the process

    def _send(self, message: messages.ToEngine) -> None:
        # Without a high-water mark it is queued, and never waits; without a peer, there is nobody to tell.
        with contextlib.suppress(zmq.Again):
            self._outbound.send(messages.encode(message), zmq.NOBLOCK)

    async def _read(self) -> None:
        while True:
            data = await self._inbound.recv()
            try:
                self._take(messages.decode_from_engine(data))
            except Exception:
                logger.exception("a message of the engine could not be taken")
                self._die("the engine's answers cannot be read")
                raise

    def _take(self, message: messages.FromEngine) -> None:
        if isinstance(message, messages.StepOutputs):
            self.stats = message.stats
            now = time.monotonic()
            for output in message.outputs:
                self._hand_out(output, now)
        elif isinstance(message, messages.AdminReply):
            reply = self._replies.pop(message.call_id)
            if not reply.done():
                if message.error is None:
                    reply.set_result(message.result)
                else:
                    reply.set_exception(CommandFailed(message.error))
        elif isinstance(message, messages.Ready):
            self._ready.set_result(message.info)
        else:
            self._die(message.reason)

    def _hand_out(self, output: TokenOutput, now: float) -> None:
        request_id = output.request_id
        call = self._calls.get(request_id)
        if call is None:
            return  # cancelled, or stopped by its text, while this was on its way
        if output.finish_reason is not None:
            self._forget(request_id)
        else:
            self._queued_tokens -= self._queued.pop(request_id, 0)
        call.put(now, output)

    def _forget(self, request_id: int) -> bool:
        """Take a request off the books; False if it was not on them."""
        self._queued_tokens -= self._queued.pop(request_id, 0)
        return self._calls.pop(request_id, None) is not None

    def _on_death(self) -> None:
        """The process has ended. One that ended by itself has said why, and that is still on its way."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._process.sentinel)
        self._process.join(1.0)  # it is ending: for its status
        code = self._process.exitcode or 0
        if code < 0:
            self._die(f"the engine process was killed by signal {-code}")
        else:
            loop.call_later(LAST_WORDS_SECONDS, self._die, f"the engine process ended with status {code}")

    def _die(self, reason: str) -> None:
        if self._error is None:
            self._error = reason
        if not self._ready.done():
            self._ready.set_exception(EngineStartError(self._error))
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(EngineGone(self._error))
        self._replies.clear()
        for call in dict.fromkeys(self._calls.values()):
            call.fail(EngineGone(self._error))
        self._calls.clear()
        self._queued.clear()
        self._queued_tokens = 0
