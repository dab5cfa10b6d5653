"""Ranks that torchrun has started, on one host or on several: how they find each other.

Every one of its processes has the same command line. That of rank 0 is carried out; the others follow it
(`runtime.parallel.follower`). Rank 0 listens at torchrun's MASTER_ADDR, and says in torchrun's store on which port, and
the key that whoever connects must know; the store is for a private network, and so is this.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import AuthenticationError, connection
from multiprocessing.connection import Connection

import torch.distributed as dist

from runtime.model_config import ModelError

MEET_S = 300.0
"""For the processes to find each other: some hosts start late."""
GREET_S = 10.0
"""For one that has connected to rank 0 to say who it is, so that one that is silent does not hold up the others."""
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Job:
    """This process among torchrun's."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    attempt: str  # torchrun starts all anew after one has failed

    @property
    def one_host(self) -> bool:
        """Whether all ranks are on this host."""
        return self.local_size == self.size

    def store(self) -> dist.Store:
        """Where processes leave word for each other: that of torchrun's agent. Raises ModelError."""
        hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and self.rank == 0
        patience = datetime.timedelta(seconds=MEET_S)
        try:
            store = dist.TCPStore(self.address, self.port, is_master=hosts, timeout=patience, wait_for_workers=False)
        except dist.DistError as error:
            raise ModelError(
                f"torchrun's store at {self.address}:{self.port} cannot be reached ({_brief(error)}); see whether that "
                "host is up, and the port free for torchrun"
            ) from None
        return dist.PrefixStore(f"diptych/{self.attempt}", store)


def job() -> Job | None:
    """As the environment says; None where torchrun has not started this process. Raises ModelError."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        rank, size, local_rank, local_size, address, port = (os.environ[name] for name in _NAMES)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return Job(int(rank), int(size), int(local_rank), int(local_size), address, int(port), attempt)
    except (KeyError, ValueError) as error:
        raise ModelError(f"torchrun's environment is incomplete ({error}); start this with torchrun itself") from None


class Elsewhere:
    """A process that torchrun looks after, where `subprocess.Popen` is meant: it ends when its sockets are shut."""

    def __init__(self, *links: Connection) -> None:
        self._links = links
        self.gone = threading.Event()

    def kill(self) -> None:
        """Have it end, unless it is stopped; torchrun kills it when this process ends."""
        for link in self._links:
            if not link.closed:
                _shut(link)

    def wait(self, timeout: float | None = None) -> int:
        """Until its last socket is shut. Raises subprocess.TimeoutExpired."""
        if not self.gone.wait(timeout):
            raise subprocess.TimeoutExpired("rank", timeout or 0.0)
        return 0


def meet(job: Job, store: dist.Store) -> list[tuple[Connection, Connection]]:
    """On rank 0: the sockets for orders and for signs of life of ranks 1, 2, ... Raises ModelError after MEET_S."""
    key, until = secrets.token_bytes(32), time.monotonic() + MEET_S
    links: dict[tuple[int, str], Connection] = {}
    with contextlib.ExitStack() as unless_all, socket.create_server((job.address, 0)) as server:
        store.set("key", key.hex())
        store.set("port", str(server.getsockname()[1]))
        while len(links) < 2 * (job.size - 1):
            try:
                server.settimeout(max(0.001, until - time.monotonic()))
                accepted, _ = server.accept()
            except TimeoutError:
                come = {rank for rank, _ in links}
                missing = ", ".join(str(rank) for rank in range(1, job.size) if rank not in come) or "some"
                raise ModelError(
                    f"of {job.size} ranks these have not come within {MEET_S:g} s: {missing}; see their logs"
                ) from None
            link = unless_all.enter_context(_at_once(accepted))
            try:
                with _within(link, min(GREET_S, until - time.monotonic())):
                    connection.deliver_challenge(link, key)  # type: ignore[attr-defined]
                    connection.answer_challenge(link, key)  # type: ignore[attr-defined]
                    rank, kind = link.recv_bytes().decode().split()
                    links[int(rank), kind] = link
            except (AuthenticationError, EOFError, OSError, ValueError):
                link.close()  # somebody else
        unless_all.pop_all()
    return [(links[rank, "orders"], links[rank, "life"]) for rank in range(1, job.size)]


def find(job: Job, store: dist.Store) -> tuple[Connection, Connection]:
    """On another rank: the same sockets, from its side. Raises ModelError after MEET_S."""
    with contextlib.ExitStack() as unless_both:
        try:
            address, key = (job.address, int(store.get("port"))), bytes.fromhex(store.get("key").decode())
            links = []
            for kind in ("orders", "life"):
                link = unless_both.enter_context(_at_once(socket.create_connection(address, timeout=MEET_S)))
                with _within(link, MEET_S):  # rank 0 greets one at a time
                    connection.answer_challenge(link, key)  # type: ignore[attr-defined]
                    connection.deliver_challenge(link, key)  # type: ignore[attr-defined]
                    link.send_bytes(f"{job.rank} {kind}".encode())
                links.append(link)
        except (AuthenticationError, EOFError, OSError, ValueError, dist.DistError) as error:
            raise ModelError(
                f"rank {job.rank} has not found rank 0 at {job.address} within {MEET_S:g} s ({_brief(error)}); see the "
                "log of rank 0, and whether its host can be reached from here"
            ) from None
        unless_both.pop_all()
    return links[0], links[1]


def _at_once(connected: socket.socket) -> Connection:
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a step is one small message
    connected.settimeout(None)
    return Connection(connected.detach())


@contextlib.contextmanager
def _within(link: Connection, seconds: float) -> Iterator[None]:
    """Shut the socket after so long, so that whoever reads from it inside gets EOFError or OSError."""
    timer = threading.Timer(max(0.0, seconds), _shut, [link])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # or it might shut what has the same number by then


def _shut(link: Connection) -> None:
    with socket.socket(fileno=os.dup(link.fileno())) as shared, contextlib.suppress(OSError):
        shared.shutdown(socket.SHUT_RDWR)  # if it was not first


def _brief(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
