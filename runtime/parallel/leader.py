"""Rank 0's side: starts the other ranks on this host, tells them what to do, and notices when one is gone.

To each of them there are two pairs of sockets. Orders go down one; the other brings signs of life up, and answers. A
rank that dies closes both, and one that is stopped falls silent. One that is stuck in the midst of a step is known by
what it does not do: the step does not end, and nobody computes. Then the others are killed, so that nobody waits for it
any longer, and whoever asks rank 0 for a result gets RankFailed.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from runtime.model_config import ModelError
from runtime.parallel import ranks, torchrun
from runtime.parallel.ranks import Ranks
from runtime.parallel.shard import Shard
from runtime.parallel.torchrun import Elsewhere
from runtime.parallel.wire import StepWork, pack

logger = logging.getLogger(__name__)

SILENCE_S = 10.0
"""Without a sign of life for so long a rank counts as hanging; they come twice a second."""
STEP_S = 0.01
"""So much has to be computed, by anybody, for a step that does not end to be only a long one."""
START_S = 300.0
"""For a rank to give its first sign of life, which is after the libraries are loaded."""
PATIENCE = 6
"""So many times as long while nothing is served yet: libraries that are being loaded may hold a process up."""
STUCK_S = 20.0
"""After a rank has failed, this process is ended where it does not come back from its card for so long."""
END_S = 10.0
"""What a rank may take to end when it is told to."""
EXPLAIN_S = 5.0
"""An exchange that breaks off is noticed before the death that is its cause; so long the cause is waited for."""


class RankFailed(RuntimeError):
    """A rank has died, hangs, or has failed; the model serves nothing any more."""


class _Follower:
    """One of the other ranks, as rank 0 has it."""

    def __init__(
        self, shard: Shard, orders: Connection, life: Connection, process: subprocess.Popen[bytes] | Elsewhere
    ) -> None:
        self.shard, self.orders, self.life, self.process = shard, orders, life, process
        self.heard = time.monotonic()
        self.answers = 0
        self.computed = 0.0

    def fate(self) -> str:
        """How the process has ended, which it is about to have."""
        try:
            code = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "has closed its connection"
        return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"


def _start(shard: Shard, device: str, meeting_place: Path, num_threads: int) -> _Follower:
    """On this host."""
    (ours, theirs), (life, their_life) = socket.socketpair(), socket.socketpair()
    with theirs, their_life:
        handles = theirs.fileno(), their_life.fileno()
        words = [*handles, shard.rank, shard.size, device, meeting_place]
        process = subprocess.Popen(
            [sys.executable, "-m", "runtime.parallel.follower", *map(str, words)],
            stdin=subprocess.DEVNULL,
            pass_fds=handles,
            env={**os.environ, "OMP_NUM_THREADS": str(num_threads), "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    return _Follower(shard, Connection(ours.detach()), Connection(life.detach()), process)


def _meet(job: torchrun.Job, store: dist.Store) -> list[_Follower]:
    """Those that torchrun has started."""
    links = enumerate(torchrun.meet(job, store), start=1)
    return [_Follower(Shard(rank, job.size), *both, Elsewhere(*both)) for rank, both in links]


class _Step:
    """A step whose result rank 0 waits for."""

    def __init__(self, since: float, computed: Callable[[], float]) -> None:
        self.since = since  # nobody has computed
        self._computed = computed
        self._total = 0.0

    def moves(self, followers: list[_Follower]) -> bool:
        """Whether anybody has computed since this was last so."""
        total = self._computed() + sum(follower.computed for follower in followers)
        if total - self._total < STEP_S:
            return False
        self._total = total
        return True


class Leader(Ranks):
    """Rank 0 of a model, and the processes of the others. Use as a context manager, or `close()` it.

    Args:
        size: how many ranks there are; the others are started here, on this host, unless torchrun has started them.
        device: rank 0's; rank r of a card's model has the card r places after it.
        silence_s: after which a rank without a sign of life counts as hanging.
        start_s: after which one that has never given any does.
    """

    def __init__(
        self, size: int, device: torch.device | str, *, silence_s: float = SILENCE_S, start_s: float = START_S
    ) -> None:
        super().__init__(Shard(0, size))
        device, job = torch.device(device), torchrun.job()
        if job is not None:
            if (job.rank, job.size) != (0, size):
                raise ModelError(f"torchrun has started {job.size} ranks; write --tensor-parallel {job.size}")
            devices = [torch.device("cuda", job.local_rank) if device.type == "cuda" else device]
        elif device.type == "cuda":
            first = device.index or 0
            if first + size > torch.cuda.device_count():
                raise ModelError(
                    f"{size} ranks from {device} on need {first + size} cards, and this machine has "
                    f"{torch.cuda.device_count()}; lower --tensor-parallel"
                )
            devices = [torch.device("cuda", first + rank) for rank in range(size)]
        else:
            devices = [device] * size
        self.device = devices[0]
        self._silence_s, self._start_s = silence_s, start_s
        self._changed = threading.Condition()
        self._failure: str | None = None
        self._closed = False
        self._calls = 0
        self.serving = False
        """Whether steps may be on their way: then somebody looks for failures."""
        self._step: _Step | None = None  # that is waited for
        self.on_failure: Callable[[], None] = lambda: None
        """Called when a rank has failed, on a thread of ours."""
        self._folder = tempfile.TemporaryDirectory(prefix="diptych-ranks-", ignore_cleanup_errors=True)
        place: Path | dist.Store
        if job is None:
            place = Path(self._folder.name) / "store"
            threads = max(1, torch.get_num_threads() // size)
            self.followers = [_start(Shard(rank, size), str(devices[rank]), place, threads) for rank in range(1, size)]
        else:
            place = job.store()
            self.followers = _meet(job, place)
            for follower in self.followers:
                follower.orders.send_bytes(device.type.encode())
        self._watching = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watching.start()
        try:
            self._await_answers(0)  # the first sign of life says that it is there
            ranks.join(0, size, self.device, place)
        except BaseException as error:
            failure = self.explain(error)
            self.close()
            raise failure from error

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Orders

    def send(self, work: StepWork) -> None:
        """Tell the others of a step, before it is run here."""
        message = pack(work).data.cast("B")
        for follower in self.followers:
            follower.orders.send_bytes(message)

    def order(self, name: str, *arguments: Any, **named: Any) -> int:
        """Have the others do what their method `name` does, after all that they were told before. Returns its number,
        for `wait`."""
        self.check()
        self._calls += 1
        message = np.zeros(1, np.int32).tobytes() + pickle.dumps((name, arguments, named))
        for follower in self.followers:
            follower.orders.send_bytes(message)
        return self._calls

    def wait(self, number: int) -> None:
        """Until all the others have done an order. Raises ModelError where one of them does, and RankFailed."""
        self._await_answers(number)

    def _await_answers(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or all(f.answers > number for f in self.followers))
        self.check()

    @contextmanager
    def waiting(self, computed: Callable[[], float] | None) -> Iterator[None]:
        """While rank 0 waits for the result of a step, from inside. `computed`: seconds that its own thread has
        computed, on a CPU; on a card there is none.
        """
        self._step = _Step(time.monotonic(), computed or (lambda: 0.0))
        try:
            yield
        finally:
            self._step = None

    # Failures

    @property
    def failed(self) -> bool:
        """Whether a rank has failed."""
        return self._failure is not None

    def check(self) -> None:
        """Raise RankFailed where a rank has failed."""
        if self._failure is not None:
            raise RankFailed(self._failure)

    def explain(self, error: BaseException) -> BaseException:
        """What is to be raised for an error on rank 0: that a rank has failed, where that is the cause."""
        if not isinstance(error, Exception) or isinstance(error, RankFailed | ModelError):
            return error
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None, EXPLAIN_S)
        return error if self._failure is None else RankFailed(self._failure)

    def _watch(self) -> None:
        by_life = {follower.life: follower for follower in self.followers}
        now = time.monotonic()
        while True:
            before = now
            for ready in connection.wait(list(by_life), timeout=0.5):
                follower = by_life[ready]  # type: ignore[index]
                try:
                    self._hear(follower, follower.life.recv())
                except (EOFError, OSError):
                    del by_life[follower.life]
                    if isinstance(follower.process, Elsewhere):
                        follower.process.gone.set()
                    self.fail(f"rank {follower.shard.rank} {follower.fate()}")
            with self._changed:
                if self._closed and not by_life:
                    return
            now = time.monotonic()
            started = self._silence_s * (1 if self.serving else PATIENCE)
            for follower in by_life.values():
                limit = started if follower.answers else self._start_s
                if now - before > self._silence_s / 2:
                    follower.heard = now  # it is this process that was held up
                if now - follower.heard > limit:
                    self.fail(f"rank {follower.shard.rank} has given no sign of life for {limit:g} s and was killed")
            step = self._step
            if step is not None:
                if now - before > self._silence_s / 2 or step.moves(self.followers):
                    step.since = now
                if now - step.since > self._silence_s:
                    self.fail(
                        f"ranks are stuck: a step has not ended, and nobody has computed for {self._silence_s:g} s"
                    )

    def _hear(self, follower: _Follower, message: tuple[str, str]) -> None:
        follower.heard = time.monotonic()
        kind, text = message
        if kind == "beat":
            follower.computed = float(text)
        elif kind == "failed":
            self.fail(f"rank {follower.shard.rank}: {text}")
        elif kind == "done":
            with self._changed:
                follower.answers += 1
                self._changed.notify_all()

    def fail(self, reason: str) -> None:
        """The model serves nothing any more: end the other ranks, and have whoever waits for them told why."""
        with self._changed:
            if self._failure is not None or self._closed:
                return
            self._failure = f"tensor-parallel {reason}"
            self._changed.notify_all()
        logger.critical("%s; the model serves nothing any more", self._failure)
        for follower in self.followers:
            follower.process.kill()
        if self.device.type == "cuda":
            threading.Thread(target=self._end_if_stuck, daemon=True).start()
        self.abort()
        self.on_failure()

    def _end_if_stuck(self) -> None:
        time.sleep(STUCK_S)
        if self.serving:
            logger.critical("%s, and the card does not come back; the process ends", self._failure)
            os._exit(1)

    def close(self) -> None:
        """End the other ranks. Nothing may be on its way."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
        for follower in self.followers:
            follower.orders.close()  # which it takes for the end
        until = time.monotonic() + END_S
        try:
            ranks.leave()
        finally:
            for follower in self.followers:
                try:
                    follower.process.wait(max(0.0, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    logger.warning("rank %d does not end; it is killed", follower.shard.rank)
                    follower.process.kill()
                    follower.process.wait()
            self._watching.join()
            for follower in self.followers:
                follower.life.close()
            self._folder.cleanup()
