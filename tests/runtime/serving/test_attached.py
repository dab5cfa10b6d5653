"""Replicas at addresses: like those on this machine, lost without leaving anybody hanging, closed to strangers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from experiments.replicas import Places
from experiments.spec import SpecError
from runtime.serving import remote_link
from runtime.serving.engine_client import EngineStartError
from runtime.serving.engine_host import FrontSocket
from runtime.serving.remote_link import RemoteLink
from tests.runtime.serving.attaching import TOKEN, Hosting, front, hosting
from tests.runtime.serving.disconnecting import Client
from tests.runtime.serving.running import nothing_left, wait_until

LONG = {"prompt": [5] * 20, "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def host(model_folder: Path) -> Iterator[Hosting]:
    with hosting(model_folder) as started:
        yield started


def test_an_attached_replica_serves_and_obeys_like_a_local_one_and_its_death_leaves_nobody_hanging(
    model_folder: Path, host: Hosting
) -> None:
    with front(model_folder, host.address, local=1) as server:
        bodies = [{**LONG, "max_tokens": 30, "seed": i} for i in range(4)]
        texts = [client.json()["choices"][0]["text"] for client in [Client(server, body) for body in bodies]]
        assert all(engine["steps"]["count"] > 20 for engine in server.info()["engines"])
        assert server.metric("diptych:engine_up") == 2
        swapped = server.operate("/admin/policies", {"scheduler": "sarathi,chunk_size=64"})
        assert [answer["stack"]["scheduler"] for answer in swapped["replicas"]] == ["sarathi,chunk_size=64"] * 2
        server.operate("/admin/replicas/0/drain")
        again = [server.http.post("/v1/completions", json=body).json()["choices"][0]["text"] for body in bodies]
        assert again == texts  # the attached one alone
        server.operate("/admin/replicas/0/undrain")

        begun = [Client(server, {**LONG, "stream": True}) for _ in range(8)]
        for client in begun:
            assert b"200 OK" in client.read_some()
        waiting = [Client(server, {**LONG, "max_tokens": 5}) for _ in range(8)]
        wait_until(lambda: server.info()["queued"] >= 6, "both replicas have requests that wait")
        server.engine(1).kill()
        assert [client.status() for client in waiting] == [200] * 8
        rests = [client.everything() for client in begun]
        assert sum(b"the engine process was killed by signal 9" in rest for rest in rests) == 4
        assert all(rest.rstrip(b"\r\n0").endswith(b"data: [DONE]") for rest in rests)
        assert [engine["state"] for engine in server.info()["engines"]] == ["serving", "dead"]

        assert server.operate("/admin/replicas/1/restart") == {"replica": 1}  # dead: the fresh one is attached
        assert server.operate("/admin/replicas/1/restart") == {"replica": 1}  # alive
        server.operate("/admin/replicas/0/drain")
        assert server.http.post("/v1/completions", json=bodies[0]).json()["choices"][0]["text"] == texts[0]
        assert server.info()["live"] == 0


def test_a_replica_that_is_lost_with_its_whole_host_ends_streams_with_an_error(model_folder: Path) -> None:
    lost = Hosting(model_folder)
    lost.said("ready")
    with front(model_folder, lost.address) as server:
        engine = server.engine(0)
        client = Client(server, {**LONG, "stream": True})
        assert b"200 OK" in client.read_some()
        lost.process.kill()
        assert b"is lost" in client.everything()
        nothing_left([engine.pid])
        assert server.http.get("/health").status_code == 503


def test_a_front_that_is_killed_makes_room_for_the_next(model_folder: Path, host: Hosting) -> None:
    gone = sum("the front has gone" in line for line in host.lines)
    ready = sum(line == "ready" for line in host.lines)
    with front(model_folder, host.address) as server:
        client = Client(server, {**LONG, "stream": True})
        assert b"200 OK" in client.read_some()
        engine = server.engine(0)
        server.process.kill()
        host.said("the front has gone", times=gone + 1)
        nothing_left([engine.pid])
        host.said("ready", times=ready + 1)
    with front(model_folder, host.address) as server:
        assert server.http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2}).status_code == 200


def test_nobody_but_the_front_is_heard_and_strangers_do_not_disturb_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_link, "ATTACH_SECONDS", 2.0)
    asyncio.run(_strangers())


async def _strangers() -> None:
    heard: list[bytes] = []

    async def hear(listening: FrontSocket) -> None:
        while True:
            heard.append(await listening.receive())

    async def greet(listening: FrontSocket) -> None:
        await listening.attached()
        listening.send(b"welcome")

    async def attach(token: str, keys: tuple[bytes, bytes] | None = None) -> RemoteLink:
        link = RemoteLink(listening.address, token)
        if keys is not None:
            link._socket.curve_publickey, link._socket.curve_secretkey = keys
        try:
            await link.open(lambda data: None, lambda reason: None)
        except EngineStartError:
            await link.close(None)
            raise
        link.send(token.encode())
        return link

    with FrontSocket("tcp://127.0.0.1:0", TOKEN) as listening:
        hearing = asyncio.create_task(hear(listening))
        with pytest.raises(EngineStartError, match="the token is not the engine's, or no engine is behind it"):
            await attach("another token of length")
        with pytest.raises(EngineStartError, match="refuses this front"):
            await attach(TOKEN, zmq.curve_keypair())  # knows the engine's key, and has none of a front's
        await _knock(listening, 3)
        link, _ = await asyncio.gather(attach(TOKEN), greet(listening))
        gone = asyncio.create_task(listening.gone())
        with pytest.raises(EngineStartError, match="it has one already"):
            await attach(TOKEN)
        await _knock(listening, 2)
        assert not gone.done()
        link.send(b"still here")
        while len(heard) < 2:
            await asyncio.sleep(0.01)
        assert heard == [TOKEN.encode(), b"still here"]
        await link.close(None)
        await asyncio.wait_for(gone, 5)
        hearing.cancel()


async def _knock(listening: FrontSocket, count: int) -> None:
    """So many at once who speak another protocol; all of them are gone afterwards."""
    host, port = listening.address.removeprefix("tcp://").split(":")
    with contextlib.ExitStack() as opened:
        strangers = [opened.enter_context(socket.create_connection((host, int(port)))) for _ in range(count)]
        for stranger in strangers:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        for stranger in strangers:
            await asyncio.to_thread(_read_all, stranger)


def _read_all(connection: socket.socket) -> None:
    """Until the other end has closed, one way or another."""
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(4096):
            pass


def test_what_is_wrong_with_an_address_or_a_token_is_said_at_once() -> None:
    with pytest.raises(SpecError, match="need the token"):
        Places(("tcp://10.0.0.7:7000",))
    with pytest.raises(ValueError, match="at least 16 characters"):
        Places(("tcp://10.0.0.7:7000",), token="short")
    for address in ("10.0.0.7:7000", "tcp://10.0.0.7", "tcp://:7000", "tcp://10.0.0.7:70000"):
        with pytest.raises(ValueError, match="write tcp://HOST:PORT"):
            Places((address,), token=TOKEN)
