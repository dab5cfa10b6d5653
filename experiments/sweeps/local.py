"""Cells on processes of this machine: one at a time each, and a process that dies takes no other cell with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.sweeps.cell_run import Job, perform_in

CELLS_PER_PROCESS = 32
"""After which a simulating process makes way for a new one: what Python and its libraries keep does not add up."""
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class LocalRunner:
    """Runs jobs, each into its folder among the cells; gives each with its note as it ends, in any order.

    Real runs are measurements: one after another, in one process that has all cores and keeps its model loaded. A job
    whose process dies has failed. Processes stay for the next jobs, until `close`; when an iterator is closed before
    its end, or this process ends in whatever way, so do they.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._workers: list[_Worker] = []
        self._alone = False

    def __call__(self, jobs: Sequence[Job], cells: Path) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Run jobs of one panel."""
        alone = any(job.panel == "real" for job in jobs)
        if alone != self._alone:
            self.close()
        self._alone = alone
        while len(self._workers) < (1 if alone else min(self._processes, len(jobs))):
            self._workers.append(_Worker(alone))
        waiting = deque(jobs)
        ended = False
        try:
            while waiting or any(worker.job for worker in self._workers):
                for worker in self._workers:
                    if worker.job is None and waiting:
                        worker.give(waiting.popleft(), cells)
                signs = {sign: worker for worker in self._workers if worker.job is not None for sign in worker.signs}
                for worker in dict.fromkeys(signs[sign] for sign in wait(list(signs))):
                    yield worker.take()
            ended = True
        finally:
            if not ended:
                self.close()

    def close(self) -> None:
        """Put an end to the processes."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def __enter__(self) -> LocalRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """A process that runs one job at a time, and the end of the pipe to it."""

    def __init__(self, alone: bool) -> None:
        self._alone = alone
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._done = 0
        self.job: Job | None = None

    def give(self, job: Job, cells: Path) -> None:
        """Have it run a job."""
        if self._process is None or (not self._alone and self._done >= CELLS_PER_PROCESS):
            self._start()
        assert self._pipe is not None
        self.job = job
        self._done += 1
        try:
            self._pipe.send((job, cells))
        except OSError:  # it died between two jobs
            self._start()
            self._pipe.send((job, cells))

    def _start(self) -> None:
        self.end()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        with _one_thread(not self._alone), _without_main():
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
        theirs.close()
        self._done = 0

    @property
    def signs(self) -> tuple[Any, ...]:
        """What `wait` waits for: that the job has ended, or the process."""
        assert self._process is not None
        return (self._pipe, self._process.sentinel)

    def take(self) -> tuple[Job, dict[str, Any]]:
        """The job and what became of it."""
        assert self.job is not None
        assert self._pipe is not None
        assert self._process is not None
        job, self.job = self.job, None
        try:
            return job, self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            why = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
            hint = "; if memory was short, fewer --processes may help" if code == -signal.SIGKILL else ""
            self.end()
            return job, {"status": "failed", "error": f"its process died ({why}){hint}"}

    def end(self) -> None:
        """Put an end to the process."""
        if self._process is not None:
            assert self._pipe is not None
            self._pipe.close()
            self._process.kill()
            self._process.join()
            self._process = None


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """For a process that is started within: as many processes as cores are there already."""
    before = {name: os.environ.get(name) for name in _THREADS}
    if wanted:
        os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _without_main() -> Iterator[None]:
    """A process that is started within does not run the script again from which a sweep was called. It needs nothing of
    that (`code_key` refuses policies that are in a script), and a script without `if __name__ == "__main__":` would
    begin the sweep once more."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _serve(pipe: Connection) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started this
    threading.Thread(target=_follow, daemon=True).start()
    while True:
        try:
            job, cells = pipe.recv()
        except EOFError:
            return
        pipe.send(perform_in(job, cells))


def _follow() -> None:
    """End with the process that started this one, however it ended: a new sweep may want the same folders."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
