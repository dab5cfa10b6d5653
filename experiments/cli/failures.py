"""What is said of an exception that ends a command."""

from __future__ import annotations

import logging
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INTERRUPTED = 130
"""The exit status that shells expect after Ctrl-C."""

_PROJECT = Path(__file__).resolve().parents[2]
_ROOMS = tuple(_PROJECT / room for room in ("policies", "runtime", "simulator", "experiments", "dashboard"))
_LIBRARIES = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def one_line(error: Exception) -> str:
    """The error as one line.

    A ValueError or an OSError is a mistake of the user's, and its text says what to do; where it comes from a file of
    the user's, such as a policy, the line is named too. Of anything else the place is always named.
    """
    text = " ".join(str(error).split())
    if isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError | PermissionError) and error.filename:
        text = f"{error.filename} cannot be used: {error.strerror}; give another path"
    if not isinstance(error, (ValueError, OSError, RuntimeError)) or not text:
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    where = _where(error, always=not isinstance(error, (ValueError, OSError)))
    return f"{text} ({where}; diptych --traceback ... shows the whole)" if where else text


def _where(error: BaseException, always: bool) -> str:
    """The innermost line of a file of the user's; where there is none and `always`, the innermost line of all."""
    frames: list[traceback.FrameSummary] = []
    users: list[traceback.FrameSummary] = []
    cause: BaseException | None = error
    while cause is not None:
        frames = traceback.extract_tb(cause.__traceback__)
        # A library may raise from an error of its own, in which no line of the user's is left.
        users = [frame for frame in frames if _is_users(frame.filename)] or users
        cause = cause.__cause__
    if not users and not (always and frames):
        return ""
    frame = (users or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}"


def _is_users(filename: str) -> bool:
    path = Path(filename).resolve()
    return path.is_file() and not any(path.is_relative_to(folder) for folder in (*_ROOMS, *_LIBRARIES))


class _Terse(logging.Formatter):
    """A record on one line: without its traceback, with the error it is of."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            text += f": {type(error).__name__}: {error}".removesuffix(": ")
        return f"diptych: {' '.join(text.split())}"


@contextmanager
def terse_logging() -> Iterator[None]:
    """Log one line a record, on stderr. What is critical ends the command, which then says it itself."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Terse())
    handler.addFilter(lambda record: record.levelno < logging.CRITICAL)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
