"""An engine for a front on another machine: listens, and relays frames between the front and the engine's process.

The process is the one that a front starts on its own machine, and notices no difference. One engine serves one front:
when either is gone the session is over, and the next one has a fresh process. So no front ever meets the requests, the
policies or a pause that another has left behind, and a restart is nothing but attaching again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import zmq
import zmq.asyncio
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from runtime.serving import messages, tcp_socket
from runtime.serving.engine_client import EngineStartError
from runtime.serving.engine_process import LINGER_MS, Launch
from runtime.serving.heartbeat import TIMEOUT_SECONDS, Heartbeat
from runtime.serving.local_link import LocalLink

DOMAIN = "diptych"
_PING, _PONG = messages.encode(messages.Ping()), messages.encode(messages.Pong())
EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class _OneFront:
    """Says to ZeroMQ's authenticator who may connect: the first one that has a front's key, and nobody after it."""

    def __init__(self, public_key: bytes) -> None:
        self._public_key = public_key
        self._taken = False

    def callback(self, domain: str, key: bytes) -> bool:
        if self._taken or key != self._public_key:
            return False
        self._taken = True
        return True


class FrontSocket:
    """Listens at an address for one front. Use as a context manager; raises OSError where the address is taken."""

    def __init__(self, address: str, token: str) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = tcp_socket.make_socket(self._context, token, "engine")
        self._socket.linger = LINGER_MS
        self._socket.curve_server, self._socket.zap_domain = True, DOMAIN.encode()
        self._authenticator = ThreadAuthenticator(zmq.Context(self._context))
        self._authenticator.start()
        self._authenticator.configure_curve_callback(DOMAIN, _OneFront(tcp_socket.key_pair(token, "front")[0]))
        self._monitor = self._socket.get_monitor_socket(EVENTS)
        self._open: set[int] = set()  # connections, by file descriptor, until one of them is the front's
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise OSError(f"cannot listen on {address} ({error.strerror}); choose another --listen") from None
        self.address = bytes(self._socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()
        """With the port that was chosen, where it was 0."""

    def __enter__(self) -> FrontSocket:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """What was sent may still leave. The address is free afterwards. A second call does nothing."""
        if self._context.closed:
            return
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()
        self._authenticator.stop()
        self._context.term()

    async def attached(self) -> None:
        """Returns once a front is there."""
        while (event := await self._event())["event"] != zmq.EVENT_HANDSHAKE_SUCCEEDED:
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._open.add(event["value"])
            else:
                self._open.discard(event["value"])

    async def gone(self) -> None:
        """Returns once the front that was there is gone. Whoever else comes and goes does not matter.

        ZeroMQ does not say which connection is the front's. It is one of those that were open when it was let in; any
        other of these is closed when its handshake fails, or takes too long.
        """
        while self._open:
            event = await self._event()
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self._open.discard(event["value"])

    async def _event(self) -> dict[str, Any]:
        return dict(parse_monitor_message(await self._monitor.recv_multipart()))

    def send(self, data: bytes) -> None:
        """Queue a frame for the front."""
        tcp_socket.send(self._socket, data)

    async def receive(self) -> bytes:
        """The next frame from the front."""
        return await self._socket.recv()


async def host_session(
    address: str,
    token: str,
    launch: Launch,
    tell: Callable[[str, str], None],
    heartbeat_timeout_s: float = TIMEOUT_SECONDS,
) -> None:
    """Start an engine and have it serve the one front that comes for it; returns when either is gone.

    A front of which nothing is heard for `heartbeat_timeout_s` seconds is gone.
    `tell` gets what happens and its detail: (`listening`, address), (`ready`, ""), (`attached`, ""), (`over`, why).
    Raises EngineStartError where the engine does not start, OSError for an address that is taken.
    """
    with FrontSocket(address, token) as front:
        tell("listening", front.address)
        await _Session(front, launch, tell, Heartbeat(heartbeat_timeout_s)).run()


class _Session:
    def __init__(
        self, front: FrontSocket, launch: Launch, tell: Callable[[str, str], None], heartbeat: Heartbeat
    ) -> None:
        self._front = front
        self._link = LocalLink(launch)
        self._tell = tell
        self._heartbeat = heartbeat  # the front's
        self._first: bytes | None = None  # the engine's Ready, or why it does not start
        self._is_attached = False
        self._over: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        serving = asyncio.create_task(self._serve_front())
        try:
            await self._link.open(self._from_engine, self._end)
            self._tell("over", await self._over)
        finally:
            await self._link.close(None if self._first is None else messages.encode(messages.Shutdown()))
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving

    async def _serve_front(self) -> None:
        await self._front.attached()
        self._is_attached = True
        self._tell("attached", "")
        if self._first is not None:
            self._front.send(self._first)
        self._heartbeat.heard()
        tasks = [asyncio.create_task(task) for task in (self._front.gone(), self._heartbeat.stops(), self._relay())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            silent = tasks[1].done()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._is_attached = False
        self._front.close()  # the next one is to find nobody here until there is an engine for it, and call again
        self._end(
            f"the front has given no sign of life for {self._heartbeat.timeout_s:g} s"
            if silent
            else "the front has gone"
        )

    async def _relay(self) -> None:
        while True:
            data = await self._front.receive()
            self._heartbeat.heard()
            if self._first is None and data == _PING:
                self._front.send(_PONG)  # the engine loads, and hears nothing yet
            else:
                self._link.send(data)

    def _from_engine(self, data: bytes) -> None:
        if self._first is None:
            self._first = data
            first = messages.decode_from_engine(data)
            if isinstance(first, messages.Failed):
                if not self._over.done():
                    self._over.set_exception(EngineStartError(first.reason))
            else:
                self._tell("ready", "")
        if self._is_attached:
            self._front.send(data)

    def _end(self, reason: str) -> None:
        if not self._over.done():
            if self._is_attached:
                self._front.send(messages.encode(messages.Stopped(reason)))
            self._over.set_result(reason)
