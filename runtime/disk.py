"""The disk tier: a folder of files, each of which holds one KV block of all layers as it lies in host memory.

A file is written under another name and then renamed, so that none is ever there in part. It begins with what it is of:
the model and the shape of a block, the block's prefix key, and a checksum of its bytes. What is read back and does not
agree with that, is too short, or is not there at all, is no block, and the control plane is told so; as it is told
where the disk is full. A few threads do this beside the steps; nothing is flushed to the medium, as no file outlives
its server: the folder is cleared at the start and at the end.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import os
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from policies.plan import DiskCopy
from runtime.model_config import ModelError

_HEAD = struct.Struct("<8s32s32sQI")  # magic, identity, hash of the key, bytes, checksum of the bytes
_MAGIC = b"diptych1"
_THREADS = min(8, max(2, os.cpu_count() or 2))
_SUFFIX = ".kv"
TRIED_BYTES = 64 << 20
"""How much is written and read to see how fast that goes."""
Told = Callable[[int, str], None]
"""(number of a copy, what went wrong, or nothing)."""


class Place(Protocol):
    """Where the blocks of host memory lie."""

    def block_bytes(self, host: int) -> memoryview:
        """Those of one block."""
        ...


class BadBlock(Exception):
    """What is on disk is not the block that was asked for; the message says why in a word or two."""


def _head(identity: bytes, key: bytes, data: memoryview) -> bytes:
    return _HEAD.pack(_MAGIC, identity, hashlib.sha256(key).digest(), len(data), zlib.crc32(data))


def write_block(path: Path, identity: bytes, key: bytes, data: memoryview) -> None:
    """Raises OSError, with nothing left behind."""
    part = path.with_suffix(".part")
    try:
        with part.open("wb", buffering=0) as file:
            for piece in (_head(identity, key, data), data):
                left = memoryview(piece)
                while left:
                    left = left[file.write(left) :]
        part.rename(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def read_block(path: Path, identity: bytes, key: bytes, data: memoryview) -> None:
    """Into `data`, which holds anything at all where that fails. Raises OSError and BadBlock."""
    with path.open("rb", buffering=0) as file:
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            raise BadBlock("truncated")
        magic, whose, of, size, checksum = _HEAD.unpack(head)
        if magic != _MAGIC or whose != identity or size != len(data):
            raise BadBlock("another model")
        if of != hashlib.sha256(key).digest():
            raise BadBlock("another block")
        left = data
        while left:
            count = file.readinto(left)
            if not count:
                raise BadBlock("truncated")
            left = left[count:]
    if zlib.crc32(data) != checksum:
        raise BadBlock("damaged")


class DiskFolder:
    """A numbered folder below the one that is named, this process's alone, without blocks at first: the first that no
    other process has. Raises ModelError where there can be none."""

    def __init__(self, folder: str) -> None:
        if not folder:
            raise ModelError("a disk tier needs a folder; give limits.disk_folder or --disk-folder")
        try:
            for number in itertools.count():
                self.path = Path(folder) / str(number)
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR, 0o600)
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    os.close(self._lock)
            self.clear()
        except OSError as error:
            raise ModelError(
                f"limits.disk_folder: {folder} cannot be used ({error.strerror}); give another folder"
            ) from error

    def clear(self) -> None:
        """Delete its blocks, an earlier server's too."""
        for suffix in (_SUFFIX, ".part"):
            for path in self.path.glob(f"block-*{suffix}"):
                path.unlink(missing_ok=True)

    def file(self, number: int) -> Path:
        """That of one place."""
        return self.path / f"block-{number}{_SUFFIX}"

    def close(self) -> None:
        self.clear()
        os.close(self._lock)


class DiskStore:
    """Carries out `Step.disk`. `told` is called on other threads, once for each copy.

    `identity`: what model and shape the blocks are of, 32 bytes.
    """

    def __init__(self, folder: str, identity: bytes, host: Place) -> None:
        self._folder = DiskFolder(folder)
        self._identity, self._host = identity, host
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="disk")
        self._underway: set[Future[None]] = set()

    def start(self, copies: Sequence[DiskCopy], ready: Callable[[], None], told: Told) -> None:
        """Begin these, each once `ready` has returned, which waits for what steps copy to host memory and from it."""
        for copy in copies:
            future = self._pool.submit(self._copy, copy, ready, told)
            self._underway.add(future)
            future.add_done_callback(self._underway.discard)

    def _copy(self, copy: DiskCopy, ready: Callable[[], None], told: Told) -> None:
        try:
            ready()
            path, data = self._folder.file(copy.disk), self._host.block_bytes(copy.host)
            (write_block if copy.out else read_block)(path, self._identity, copy.key, data)
            error = ""
        except BadBlock as bad:
            error = str(bad)
        except FileNotFoundError:
            error = "missing"
        except OSError as failure:
            error = "disk full" if failure.errno in (errno.ENOSPC, errno.EDQUOT) else f"disk: {failure.strerror}"
        except Exception as failure:  # else whoever waits for the block would wait for ever
            error = f"{type(failure).__name__}"
        told(copy.number, error)

    def wait(self) -> None:
        """For all that has begun; it has been told then."""
        for future in list(self._underway):
            future.result()

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self._folder.close()


def block_times(folder: str, block_bytes: int) -> tuple[int, int]:
    """What reading and writing one block of so many bytes takes in that folder where many come together, in ns: tried
    with files of 64 MiB in all. The system keeps what was written in memory as long as it has some, which is what most
    of a run's blocks meet, too. Raises ModelError."""
    store = _Tried(block_bytes)
    disk = DiskStore(folder, bytes(32), store)
    try:
        count = max(_THREADS, min(1024, TRIED_BYTES // block_bytes))
        failed: list[str] = []
        took = []
        for out in (False, True)[::-1]:
            begin = time.perf_counter_ns()
            copies = [DiskCopy(i, out, i, 0, b"tried") for i in range(count)]
            disk.start(copies, lambda: None, lambda _, error: failed.append(error) if error else None)
            disk.wait()
            took.append((time.perf_counter_ns() - begin) // count)
        if failed:
            raise ModelError(f"limits.disk_folder: {folder} cannot be used ({failed[0]})")
        return took[1], took[0]
    finally:
        disk.close()


class _Tried:
    """Host memory of one block for each thread that asks."""

    def __init__(self, block_bytes: int) -> None:
        self._content = bytes(block_bytes)

    def block_bytes(self, host: int) -> memoryview:
        return memoryview(bytearray(self._content))
