"""Engines at addresses as a user starts them, `diptych engine`, and fronts that attach them."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.runtime.serving.running import (
    PATIENCE,
    Running,
    diptych,
    environment,
    limit_flags,
    nothing_left,
    running,
    wait_until,
)

TOKEN = "correct horse battery staple"
LIMITS = {"num_blocks": 128, "max_num_seqs": 4, "max_model_len": 512}


class Hosting:
    """`diptych engine`, started."""

    def __init__(self, model: Path, *flags: str, token: str = TOKEN) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        self.lines: list[str] = []
        arguments = ("--model", str(model), "--listen", self.address, "--check", *flags, *limit_flags(LIMITS))
        self.process = subprocess.Popen(
            diptych("engine", *arguments),
            env=environment() | {"DIPTYCH_TOKEN": token},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def said(self, what: str, times: int = 1) -> None:
        """Wait until it has said this."""
        wait_until(
            lambda: sum(what in line for line in self.lines) >= times or self.process.poll() is not None,
            f"the engine says {what!r}",
        )
        assert sum(what in line for line in self.lines) >= times, self.lines


@contextmanager
def hosting(model: Path, *flags: str) -> Iterator[Hosting]:
    """An engine at an address, ready; ended by SIGTERM, and nothing may be left of it."""
    host = Hosting(model, *flags)
    try:
        host.said("ready")
        yield host
        family = [host.process.pid, *(child.pid for child in psutil.Process(host.process.pid).children(recursive=True))]
        host.process.send_signal(signal.SIGTERM)
        assert host.process.wait(PATIENCE) == 0, host.lines
        assert host.lines[-1] == "ended"
    finally:
        host.process.kill()
    nothing_left(family)


@contextmanager
def front(model: Path, *addresses: str, local: int = 0, flags: tuple[str, ...] = ()) -> Iterator[Running]:
    """A server that has attached these engines, and started some of its own."""
    replicas = [flag for address in addresses for flag in ("--replica", address)]
    replicas += ["--replicas", str(local)] if local else []
    with running(model, "--token", TOKEN, "--router", "round_robin", *replicas, *flags, **LIMITS) as started:
        yield started


class Network:
    """A relay to an address, at one of its own, that can fall silent, and break the connections that it has."""

    def __init__(self, address: str) -> None:
        host, _, port = address.removeprefix("tcp://").partition(":")
        self._to = (host, int(port))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listening.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._carries = threading.Event()
        self._carries.set()
        self._start(self._accept)

    @staticmethod
    def _start(target: object, *args: object) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()  # type: ignore[arg-type]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listening.accept()[0]
                try:
                    far = socket.create_connection(self._to)
                except OSError:
                    near.close()
                    continue
                self._open += [near, far]
                self._start(self._carry, near, far)
                self._start(self._carry, far, near)

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                self._carries.wait()
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def fall_silent(self) -> None:
        """Carry nothing any more, not even that somebody has left."""
        self._carries.clear()

    def cut(self) -> None:
        """Break all connections; new ones are carried."""
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()
        self._carries.set()

    def close(self) -> None:
        self.cut()
        self._listening.close()
