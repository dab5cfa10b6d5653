"""A rank besides rank 0: does what it is told, and holds neither policies nor requests.

`python -m runtime.parallel.follower ORDERS LIFE RANK SIZE DEVICE FILE`, as `runtime.parallel.leader` starts it: two
sockets by their numbers, and the file where the ranks find each other. What torchrun has started calls `follow`.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from policies.replica_state import Limits
from runtime.executor import Executor
from runtime.memory import profile_num_blocks
from runtime.model_config import ModelError
from runtime.parallel import ranks, torchrun
from runtime.parallel.ranks import Ranks
from runtime.parallel.shard import Shard
from runtime.parallel.wire import STEP, unpack
from runtime.weights import LoadedModel, load_model

logger = logging.getLogger(__name__)

BEAT_S = 0.5


class Life:
    """The socket to rank 0 for signs of life and answers; when it closes there, this process is over.

    A sign of life says how long the thread that makes this has computed.
    """

    def __init__(self, socket: Connection) -> None:
        self._socket = socket
        self._computed = ranks.thread_clock()
        self._lock = threading.Lock()
        threading.Thread(target=self._beat, name="life", daemon=True).start()

    def say(self, kind: str, text: str = "") -> None:
        with self._lock:
            self._socket.send((kind, text))

    def _beat(self) -> None:
        try:
            while not self._socket.poll(BEAT_S):  # rank 0 never says anything here
                self.say("beat", str(self._computed()))
        except OSError:
            pass
        os._exit(1)  # rank 0 is gone; the main thread may wait for it on the device


class Follower:
    """Its methods are what rank 0 orders."""

    def __init__(self, shard: Shard, device: torch.device) -> None:
        self._ranks = Ranks(shard)
        self._device = device
        self._loaded: LoadedModel | None = None
        self._executor: Executor | None = None

    def load(self, source: str, **how: Any) -> None:
        self._loaded = None
        self._loaded = load_model(source, device=self._device, ranks=self._ranks, with_text=False, **how)

    def profile(self, **how: Any) -> None:
        assert self._loaded is not None
        profile_num_blocks(self._loaded, **how)

    def start(self, limits: Limits, attention: str, kv_dtype: torch.dtype | None) -> None:
        assert self._loaded is not None
        self._executor = Executor(self._loaded, limits, attention=attention, kv_dtype=kv_dtype)

    def step(self, message: bytes) -> None:
        assert self._executor is not None
        self._executor.execute(unpack(message))

    def stop(self) -> None:
        if self._executor is not None:
            self._executor.close()
            self._executor = None


def main(orders_fd: str, life_fd: str, rank: str, size: str, device_name: str, meeting_place: str) -> None:
    _ignore_signals()
    orders, life = Connection(int(orders_fd)), Life(Connection(int(life_fd)))
    _serve(Shard(int(rank), int(size)), torch.device(device_name), Path(meeting_place), orders, life)


def follow(job: torchrun.Job) -> None:
    """Be a rank that torchrun has started, on the card that is its own by its number on this host. Raises ModelError
    where rank 0 is not found.
    """
    _ignore_signals()
    store = job.store()
    orders, life_socket = torchrun.find(job, store)
    life = Life(life_socket)
    if not orders.poll(torchrun.MEET_S):
        raise ModelError(f"rank 0 has said nothing for {torchrun.MEET_S:g} s; see its log")
    kind = orders.recv_bytes().decode()
    device = torch.device(kind, job.local_rank) if kind == "cuda" else torch.device(kind)
    _serve(Shard(job.rank, job.size), device, store, orders, life)


def _ignore_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; rank 0 says what to do
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _serve(shard: Shard, device: torch.device, place: Path | dist.Store, orders: Connection, life: Life) -> NoReturn:
    """Until rank 0 closes the socket; the process ends."""
    try:
        life.say("done")
        ranks.join(shard.rank, shard.size, device, place)
        follower = Follower(shard, device)
        _obey(follower, orders, life)
        follower.stop()  # a communicator does not go while there are graphs that use it
    except Exception as error:
        logger.debug("rank %d fails", shard.rank, exc_info=True)
        life.say("failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
        os._exit(1)  # without waiting for what will never come
    ranks.leave()
    os._exit(0)  # there is nothing left to tidy up, and interpreters take their time


def _obey(follower: Follower, orders: Connection, life: Life) -> None:
    """Until rank 0 closes the socket."""
    head = STEP.to_bytes(4, sys.byteorder)
    while True:
        try:
            message = orders.recv_bytes()
        except EOFError:
            return
        if message.startswith(head):
            follower.step(message)
        else:
            name, arguments, named = pickle.loads(message[4:])
            getattr(follower, name)(*arguments, **named)
            life.say("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
