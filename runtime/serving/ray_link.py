"""An engine on a Ray cluster: Ray finds it a place, and the front attaches it there by its address.

An actor hosts the engine (`engine_host`) on whichever node has room, for as long as the front has it. What the two say
to each other does not pass through Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import re
import secrets
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from runtime.serving.engine_client import EngineStartError
from runtime.serving.engine_host import host_session
from runtime.serving.engine_process import Launch
from runtime.serving.link import CLOSE_SECONDS, Link
from runtime.serving.remote_link import RemoteLink

logger = logging.getLogger(__name__)

PLACE_SECONDS = 600.0
"""How long an engine may wait for room on the cluster: one that grows on demand starts a machine for it."""

PATIENCE_SECONDS = 30.0
"""After which an operator is told that it waits."""

CONNECT_SECONDS = 5.0
AUTO = "auto"
_ADDRESS = re.compile(r"([\w.-]+):(\d{1,5})")


def check_address(address: str) -> None:
    """Raises ValueError for what is no address of a Ray cluster."""
    if address != AUTO and not _ADDRESS.fullmatch(address):
        raise ValueError(
            f"{address!r} is no Ray cluster's address; write {AUTO} for the one that runs here, or its head's HOST:PORT"
        )


def connect(address: str) -> None:
    """Join the cluster as a driver; this takes some seconds. Raises ValueError, ConnectionError."""
    check_address(address)
    ray = _ray()
    try:
        # Ray itself would try for a minute.
        if match := _ADDRESS.fullmatch(address):
            socket.create_connection((match[1], int(match[2])), CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    except (OSError, OverflowError, RuntimeError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ConnectionError(
            f"no Ray cluster takes this front at {address} ({reason}); start one with: ray start --head, and where it "
            "asks for a token, set RAY_AUTH_MODE=token here too"
        ) from error


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise ValueError("a Ray cluster needs the package ray; pip install 'diptych[ray]'") from None


class RayLink(Link):
    """Starts the engine on the cluster that `connect` has joined. It has `num_gpus` GPUs of its own, or a CPU."""

    def __init__(self, launch: Launch, heartbeat_timeout_s: float, *, num_gpus: int) -> None:
        self._ray = _ray()
        self._launch = launch
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._resources = {"num_cpus": 1, "num_gpus": num_gpus}
        self._actor: Any = None
        self._link: RemoteLink | None = None

    async def open(self, on_message: Callable[[bytes], None], on_end: Callable[[str], None]) -> None:
        token = secrets.token_urlsafe(32)
        try:
            self._actor = self._ray.remote(_Host).options(**self._resources).remote()
            listening = self._actor.listen.remote(self._launch, token, self._heartbeat_timeout_s)
            address = await self._placed(asyncio.ensure_future(_result(listening)))
        except self._ray.exceptions.RayError as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise EngineStartError(f"the engine does not start on the Ray cluster: {lines[-1].strip()}") from error
        self._link = RemoteLink(address, token)
        await self._link.open(on_message, on_end)

    async def _placed(self, address: asyncio.Future[str]) -> str:
        what = "GPU" if self._resources["num_gpus"] else "CPU"
        try:
            done, _ = await asyncio.wait((address,), timeout=PATIENCE_SECONDS)
            if not done:
                logger.warning("the Ray cluster has not started an engine yet, which needs a free %s", what)
                done, _ = await asyncio.wait((address,), timeout=PLACE_SECONDS - PATIENCE_SECONDS)
            if not done:
                raise EngineStartError(f"the Ray cluster has had no {what} free for {PLACE_SECONDS:g} s")
            return address.result()
        finally:
            address.cancel()

    def send(self, data: bytes) -> None:
        if self._link is not None:
            self._link.send(data)

    def kill(self) -> None:
        if self._link is not None:
            self._link.kill()  # its host then puts an end to it

    async def close(self, shutdown: bytes | None) -> None:
        if self._link is not None:
            await self._link.close(shutdown)
            # The actor's end would leave a process behind that does not listen: one that loads, or is frozen.
            with contextlib.suppress(TimeoutError, self._ray.exceptions.RayError):
                async with asyncio.timeout(2 * CLOSE_SECONDS):
                    await _result(self._actor.ended.remote())
        if self._actor is not None:
            self._ray.kill(self._actor)


async def _result(reference: Awaitable[Any]) -> Any:
    return await reference


class _Host:
    """The actor."""

    async def listen(self, launch: Launch, token: str, heartbeat_timeout_s: float) -> str:
        """Host an engine for one front; the address, on this node."""
        address: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def tell(event: str, detail: str) -> None:
            if event == "listening":
                address.set_result(detail)

        here = f"tcp://{_ray().util.get_node_ip_address()}:0"
        self._session = asyncio.ensure_future(host_session(here, token, launch, tell, heartbeat_timeout_s))
        await asyncio.wait((address, self._session), return_when=asyncio.FIRST_COMPLETED)
        if not address.done():
            self._session.result()  # raises
        return await address

    async def ended(self) -> None:
        """Returns once nothing is left of the engine."""
        await asyncio.wait((self._session,))
