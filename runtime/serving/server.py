"""Running the application on a socket, and ending it: who is served is served to the end, or told that it is over."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from runtime.serving.service import Service

AFTER_DRAIN_SECONDS = 5
"""What connections may take to close once every request has been ended."""

KEEP_ALIVE_SECONDS = 60
"""How long a connection without a request is kept: longer than pools of clients leave theirs idle between two."""


class Server(uvicorn.Server):
    """Serves until SIGINT or SIGTERM. Then no new requests are taken; after `drain_s` seconds, or with a second signal,
    those that are left end with an error."""

    def __init__(self, app: FastAPI, service: Service, drain_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=round(drain_s) + AFTER_DRAIN_SECONDS,
                backlog=4096,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
            )
        )
        self._service = service
        self._drain_s = drain_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which kills the process with the signal once it is done, before we have closed."""
        loop = asyncio.get_running_loop()
        caught = (signal.SIGINT, signal.SIGTERM)
        for one in caught:
            loop.add_signal_handler(one, self.end)
        try:
            yield
        finally:
            for one in caught:
                loop.remove_signal_handler(one)

    def end(self) -> None:
        """Begin to end; called again, do not wait."""
        loop = asyncio.get_running_loop()
        if self.should_exit:
            self._end_everybody()
            self.force_exit = True
            return
        self._service.draining = True
        self.should_exit = True
        loop.call_later(self._drain_s, self._end_everybody)

    def _end_everybody(self) -> None:
        self._service.client.fail_all("the server is shutting down")


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one. Raises OSError with one line that says what to do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it. Without it a small write waits until the client has acknowledged the one before: 40 ms.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(f"cannot listen on {host}:{port} ({error.strerror or error}); choose another --port") from None
    return bound


def address_of(bound: socket.socket) -> str:
    """http://HOST:PORT."""
    host, port = bound.getsockname()[:2]
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).version == 6:
            host = f"[{host}]"
    return f"http://{host}:{port}"


async def serve(
    app: FastAPI, service: Service, bound: socket.socket, *, drain_s: float, on_ready: Callable[[], None]
) -> None:
    """Serve on a bound socket until a signal ends it. `on_ready` is called once requests are taken."""
    server = Server(app, service, drain_s)
    bound.listen(server.config.backlog)  # from here on connections wait in line
    asyncio.get_running_loop().call_soon(on_ready)
    await server.serve(sockets=[bound])
