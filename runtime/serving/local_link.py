"""An engine in a process of its own on this machine, reached over two Unix sockets in a private folder."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import tempfile
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from pathlib import Path

import zmq
import zmq.asyncio

from runtime.serving.engine_process import Launch, run_engine_process
from runtime.serving.link import CLOSE_SECONDS, LAST_WORDS_SECONDS, Link

logger = logging.getLogger(__name__)


class LocalLink(Link):
    """Starts the process, and knows of its death by its sentinel."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._process: SpawnProcess | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="diptych-", ignore_cleanup_errors=True)
        self._context = zmq.asyncio.Context()
        self._outbound: zmq.Socket[bytes] = zmq.Socket(self._context, zmq.PUSH)
        self._inbound = self._context.socket(zmq.PULL)
        self._reader: asyncio.Task[None] | None = None

    async def open(self, on_message: Callable[[bytes], None], on_end: Callable[[str], None]) -> None:
        commands, outputs = (f"ipc://{Path(self._folder.name) / name}" for name in ("commands", "outputs"))
        for socket, address in ((self._outbound, commands), (self._inbound, outputs)):
            socket.set_hwm(0)
            socket.bind(address)
        self._process = process = multiprocessing.get_context("spawn").Process(
            target=run_engine_process, args=(commands, outputs, self._launch), name="diptych-engine", daemon=True
        )
        process.start()
        asyncio.get_running_loop().add_reader(process.sentinel, self._ended, process, on_end)
        self._reader = asyncio.create_task(self._read(on_message))

    def send(self, data: bytes) -> None:
        # Without a high-water mark it is queued, and never waits; without a peer, there is nobody to tell.
        with contextlib.suppress(zmq.Again):
            self._outbound.send(data, zmq.NOBLOCK)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()  # it may be stopped, and then hears no other signal

    async def close(self, shutdown: bytes | None) -> None:
        process = self._process
        if process is not None:
            if process.is_alive():
                await self._end(process, shutdown)
            asyncio.get_running_loop().remove_reader(process.sentinel)
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        self._outbound.close(linger=0)
        self._inbound.close(linger=0)
        self._context.term()
        self._folder.cleanup()

    async def _end(self, process: SpawnProcess, shutdown: bytes | None) -> None:
        if shutdown is not None:
            self.send(shutdown)
        else:
            process.terminate()  # it is still loading, and hears nothing yet
        await asyncio.to_thread(process.join, CLOSE_SECONDS)
        if process.is_alive():
            logger.warning("the engine process does not end; it is killed")
            process.kill()
            await asyncio.to_thread(process.join)

    async def _read(self, on_message: Callable[[bytes], None]) -> None:
        while True:
            on_message(await self._inbound.recv())

    def _ended(self, process: SpawnProcess, on_end: Callable[[str], None]) -> None:
        """The process has ended. What it has sent may still be on its way: last outputs, and why it has ended."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(process.sentinel)
        process.join(1.0)  # it is ending: for its status
        code = process.exitcode or 0
        reason = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        loop.call_later(LAST_WORDS_SECONDS, on_end, f"the engine process {reason}")
