"""Who is frozen or cut off is noticed, wherever it is, and nobody waits for it in vain."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from policies.replica_state import Limits
from runtime.sampling.params import SamplingParams
from runtime.sequence import Details
from runtime.serving import heartbeat, messages
from runtime.serving.engine_client import EngineGone, EngineStartError, Prompt
from runtime.serving.engine_proxy import EngineProxy
from runtime.serving.heartbeat import Heartbeat
from runtime.serving.link import Link
from tests.runtime.serving.attaching import Network, front, hosting
from tests.runtime.serving.disconnecting import Client
from tests.runtime.serving.running import Running, nothing_left, wait_until

LONG = {"prompt": [5] * 20, "max_tokens": 400, "ignore_eos": True}
TIMEOUT = ("--heartbeat-timeout", "4")
SILENT = b"has given no sign of life for 4 s"
INFO = messages.EngineInfo("m", 100, Limits(num_blocks=64), {}, {}, "cpu", "float32", 1, None)


class Pretended(Link):
    """An engine that is ready at once and answers as long as it `lives`."""

    def __init__(self, *, ready: bool = True) -> None:
        self.lives, self.ready, self.killed = True, ready, False

    async def open(self, on_message: Callable[[bytes], None], on_end: Callable[[str], None]) -> None:
        self._on_message = on_message
        if self.ready:
            self._on_message(messages.encode(messages.Ready(INFO)))

    def send(self, data: bytes) -> None:
        if self.lives and isinstance(messages.decode_to_engine(data), messages.Ping):
            self._on_message(messages.encode(messages.Pong()))

    def kill(self) -> None:
        self.killed = True

    async def close(self, shutdown: bytes | None) -> None:
        pass


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "PING_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat, "MIN_TIMEOUT_SECONDS", 0.01)


@pytest.mark.usefixtures("quick")
def test_an_engine_without_a_sign_of_life_is_dead_to_its_requests_and_killed() -> None:
    async def main() -> None:
        link = Pretended()
        engine = await EngineProxy.start(link, 0.1)
        call = engine.submit([Prompt([1], SamplingParams(max_tokens=4), Details())])
        await asyncio.sleep(0.5)
        assert engine.error is None
        assert not link.killed
        link.lives = False
        with pytest.raises(EngineGone, match=r"no sign of life for 0.1 s"):
            await asyncio.wait_for(call.next(), 5)
        assert link.killed
        await engine.close()

    asyncio.run(main())


@pytest.mark.usefixtures("quick")
def test_a_front_that_was_stopped_itself_does_not_blame_its_engines() -> None:
    async def main() -> None:
        engine = await EngineProxy.start(Pretended(), 0.1)
        await asyncio.sleep(0.05)
        for _ in range(3):
            time.sleep(0.3)  # the event loop of the front stands still
            await asyncio.sleep(0.02)
        assert engine.error is None
        await engine.close()

    asyncio.run(main())


@pytest.mark.usefixtures("quick")
def test_an_engine_that_is_loading_may_be_silent() -> None:
    async def main() -> None:
        link = Pretended(ready=False)
        link.lives = False
        starting = asyncio.create_task(EngineProxy.start(link, 0.05))
        await asyncio.sleep(0.3)
        assert not starting.done()
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, EngineStartError):
            await starting

    asyncio.run(main())


def test_a_timeout_shorter_than_the_beat_is_refused() -> None:
    with pytest.raises(ValueError, match="must be 2 s or more"):
        Heartbeat(0.5)


def _begun(server: Running, count: int) -> list[Client]:
    clients = [Client(server, {**LONG, "stream": True}) for _ in range(count)]
    for client in clients:
        assert b"200 OK" in client.read_some()
    return clients


def test_frozen_engines_here_and_elsewhere_are_found_out_and_paused_ones_left_alone(model_folder: Path) -> None:
    with hosting(model_folder) as host, front(model_folder, host.address, local=2, flags=TIMEOUT) as server:
        server.operate("/admin/pause")
        time.sleep(5)
        assert [engine["state"] for engine in server.info()["engines"]] == ["serving"] * 3
        server.operate("/admin/resume")

        begun = _begun(server, 12)
        waiting = [Client(server, {**LONG, "max_tokens": 5}) for _ in range(12)]
        wait_until(lambda: server.info()["queued"] >= 10, "every replica has requests that wait")
        frozen = [server.engine(1), server.engine(2)]
        for engine in frozen:
            engine.suspend()
        assert [client.status() for client in waiting] == [200] * 12
        rests = [client.everything() for client in begun]
        assert sum(SILENT in rest for rest in rests) == 8
        assert all(rest.rstrip(b"\r\n0").endswith(b"data: [DONE]") for rest in rests)
        assert [engine["state"] for engine in server.info()["engines"]] == ["serving", "dead", "dead"]
        assert server.info()["live"] == 0
        nothing_left([frozen[0].pid])  # without a restart
        host.said("the front has gone")
        assert server.operate("/admin/replicas/2/restart") == {"replica": 2}
        nothing_left([frozen[1].pid])
        assert [engine["state"] for engine in server.info()["engines"]] == ["serving", "dead", "serving"]


def test_a_frozen_host_and_a_silent_or_broken_network_are_found_out_by_both_ends(model_folder: Path) -> None:
    with hosting(model_folder, *TIMEOUT) as host:
        network = Network(host.address)
        with contextlib.closing(network), front(model_folder, network.address, flags=TIMEOUT) as server:
            (client,) = _begun(server, 1)
            host.process.send_signal(signal.SIGSTOP)
            assert SILENT in client.everything()
            host.process.send_signal(signal.SIGCONT)
            assert server.operate("/admin/replicas/0/restart") == {"replica": 0}

            (client,) = _begun(server, 1)
            network.fall_silent()
            assert SILENT in client.everything()
            host.said("the session is over: the front " + SILENT.decode())
            network.cut()
            assert server.operate("/admin/replicas/0/restart") == {"replica": 0}

            (client,) = _begun(server, 1)
            gone = sum("the front has gone" in line for line in host.lines)
            network.cut()
            assert b"is lost" in client.everything()
            host.said("the front has gone", gone + 1)
