"""What a process needs that has many connections at once, as the server and the load generator have."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

MANY = 65_536
"""Open files where the system sets no limit."""


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, on the faster event loop where there is one. Ctrl-C cancels `main`."""
    try:
        import uvloop
    except ImportError:  # Windows
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def allow_many_connections() -> None:
    """Raise this process's limit of open files (often 1,024) as far as it may: a connection is one."""
    try:
        import resource
    except ImportError:  # Windows, which has none
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(soft, MANY) if hard == resource.RLIM_INFINITY else hard
    if soft < most:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
