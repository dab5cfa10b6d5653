"""A server as a user starts one: `diptych serve` in a process of its own, on a small model with a real tokenizer."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[3]
PATIENCE = 120.0  # a busy machine starts engines slowly
"""Seconds after which a test says that nothing will come any more."""

ADMIN_KEY = "operators-only"
OPERATOR = {"Authorization": f"Bearer {ADMIN_KEY}"}


@dataclass
class Running:
    """A server that runs. `lines` are what it has printed."""

    url: str
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def engine(self, number: int = 0) -> psutil.Process:
        """An engine's process."""
        return psutil.Process(self.operators_info()["engines"][number]["pid"])

    def info(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.get("/server_info").json()
        return answer

    def operators_info(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.get("/admin/server_info", headers=OPERATOR).json()
        return answer

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        total, found = 0.0, False
        for line in self.http.get("/metrics").text.splitlines():
            match = re.match(r"([\w:]+)(?:\{(.*)\})? (\S+)$", line)
            if match and match[1] == name and all(f'{k}="{v}"' in (match[2] or "") for k, v in labels.items()):
                total, found = total + float(match[3]), True
        assert found, f"/metrics has no {name} {labels}"
        return total

    def num_blocks_held(self) -> float:
        limits = self.info()["engines"][0]["limits"]
        return round(self.metric("vllm:kv_cache_usage_perc") * limits["num_blocks"])

    def operate(self, path: str, body: object = None) -> Any:
        answer = self.http.post(path, json=body, headers=OPERATOR)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def record(self, table: str, since_step: int = 0) -> list[dict[str, Any]]:
        """The rows of the record that the server keeps in memory, as dicts."""
        query = {"table": table, "since_step": since_step, "limit": 100_000}
        answer = self.http.get("/admin/record", params=query, headers=OPERATOR).json()
        return [dict(zip(answer["columns"], row, strict=True)) for row in answer["rows"]]


def wait_until(true: Callable[[], bool], what: str) -> None:
    """Ask again and again; a test may poll."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"it never came that {what}"
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def nothing_left(pids: Iterable[int]) -> None:
    """Wait until none of these processes lives."""
    wait_until(lambda: not any(map(_lives, pids)), f"no process of {pids} is left")


def diptych(*arguments: str) -> list[str]:
    """A command as a user types it."""
    return [sys.executable, "-c", "from experiments.cli import main; main()", *arguments]


def limit_flags(limits: Mapping[str, object]) -> list[str]:
    """The limits of a specification as flags."""
    return [part for name, value in limits.items() for part in ("--set", f"limits.{name}={value}")]


def environment(*folders: Path) -> dict[str, str]:
    """What a command of ours runs in; `folders` are searched for modules too."""
    paths = os.pathsep.join(map(str, (ROOT, *folders)))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "COLUMNS": "200"}


@contextmanager
def running(
    model: Path | str,
    *flags: str,
    admin: bool = True,
    path: Path | None = None,
    patience: float = PATIENCE,
    **limits: object,
) -> Iterator[Running]:
    """`diptych serve` with these flags and limits; ended by Ctrl-C, and nothing may be left of it.

    `path`: a folder with policies of the test's own; `patience`: seconds that it may take to start.
    """
    command = diptych("serve", "--model", str(model), "--port", "0", "--drain", "0.2", *flags, *limit_flags(limits))
    if admin:
        command += ["--admin", "--admin-key", ADMIN_KEY]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(*([] if path is None else [path])),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if "serving on http" in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert ready.wait(patience), lines
    found = [match[1] for line in lines if (match := re.search(r"serving on (http\S+)", line))]
    assert found, "\n".join(lines)
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    server = Running(found[0], process, lines)
    try:
        yield server
    finally:
        server.http.close()
        process.send_signal(signal.SIGINT)
        try:
            process.wait(PATIENCE)
        finally:
            process.kill()
            reader.join(PATIENCE)
            nothing_left(family)
