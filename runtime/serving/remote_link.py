"""An engine elsewhere, attached by its address: `diptych engine` listens there (`engine_host`)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from runtime.serving import tcp_socket
from runtime.serving.engine_client import EngineStartError
from runtime.serving.link import CLOSE_SECONDS, LAST_WORDS_SECONDS, Link

ATTACH_SECONDS = 30.0
"""How long to call for an engine that does not answer: one that is restarted listens again after some seconds."""

CONNECT_MS = 5_000
RECONNECT_MS = 1_000  # longer than the last words take: an engine that has gone is not to be called by mistake
EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_DISCONNECTED
)


class RemoteLink(Link):
    """Knows of the engine's death by the connection's end. While the engine loads, its host gives signs of life."""

    def __init__(self, address: str, token: str) -> None:
        tcp_socket.check_address(address)
        self._address = address
        self._context = zmq.asyncio.Context()
        self._socket = tcp_socket.make_socket(self._context, token, "front")
        self._socket.curve_serverkey = tcp_socket.key_pair(token, "engine")[0]
        self._socket.connect_timeout, self._socket.reconnect_ivl = CONNECT_MS, RECONNECT_MS
        self._monitor = self._socket.get_monitor_socket(EVENTS)
        self._tasks: list[asyncio.Task[None]] = []
        self._num_closed = 0  # connections, before there was a handshake
        self._heard = asyncio.Event()
        self._ended = asyncio.Event()

    async def open(self, on_message: Callable[[bytes], None], on_end: Callable[[str], None]) -> None:
        attached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks = [
            asyncio.create_task(self._watch(attached, on_end)),
            asyncio.create_task(self._read(on_message)),
        ]
        self._socket.connect(self._address)
        try:
            async with asyncio.timeout(ATTACH_SECONDS):
                await attached
                await self._heard.wait()  # from now on a silence is noticed by the heartbeat
        except TimeoutError:
            if self._num_closed:
                why = f"{self._address} closes the connection: the token is not the engine's, or no engine is behind it"
            else:
                why = f"no engine answers at {self._address}; start one: diptych engine --model M --listen tcp://..."
            raise EngineStartError(why) from None

    def send(self, data: bytes) -> None:
        tcp_socket.send(self._socket, data)

    def kill(self) -> None:
        self._disconnect()
        self._ended.set()

    async def close(self, shutdown: bytes | None) -> None:
        if shutdown is not None and not self._ended.is_set():
            self.send(shutdown)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._ended.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        self._context.term()

    async def _watch(self, attached: asyncio.Future[None], on_end: Callable[[str], None]) -> None:
        while True:
            event = parse_monitor_message(await self._monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                if not attached.done():
                    attached.set_result(None)
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                if not attached.done():
                    why = f"{self._address} refuses this front: it has one already"
                    attached.set_exception(EngineStartError(why))
            elif event != zmq.EVENT_DISCONNECTED:
                self._num_closed += 1  # perhaps by a tunnel, whose engine is just being restarted: call again
            elif attached.done():
                break
        self._heard.set()  # nothing will come any more
        await asyncio.sleep(LAST_WORDS_SECONDS)
        self._disconnect()  # or it would call again
        self._ended.set()
        on_end(f"the connection to the engine at {self._address} is lost")

    async def _read(self, on_message: Callable[[bytes], None]) -> None:
        while True:
            data = await self._socket.recv()
            self._heard.set()
            on_message(data)

    def _disconnect(self) -> None:
        with contextlib.suppress(zmq.ZMQError):  # it may have been done already
            self._socket.disconnect(self._address)
