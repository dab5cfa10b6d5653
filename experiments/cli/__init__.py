"""The command line, `diptych`: one file a group of commands, errors of one line."""

from __future__ import annotations

import sys

from experiments.cli.app import app, complain
from experiments.cli.failures import INTERRUPTED, one_line, terse_logging

TRACEBACK = "--traceback"


def main() -> None:
    """Entry point. Any error ends in one line on stderr and exit status 2, Ctrl-C in status 130."""
    sys.path.insert(0, "")  # so that module:Class finds a policy in the current folder
    args = [arg for arg in sys.argv[1:] if arg != TRACEBACK]
    if len(args) < len(sys.argv[1:]):
        _run(args)
        return
    try:
        with terse_logging():
            _run(args)
    except KeyboardInterrupt:
        complain("interrupted")
        sys.exit(INTERRUPTED)
    except Exception as error:
        complain(one_line(error))
        sys.exit(2)


def _run(args: list[str]) -> None:
    # Importing a module adds its commands. Here, as it takes its time, in which Ctrl-C may come.
    from experiments.cli import bench, demo, look, profiling, published, running, serving, tracing, validating  # noqa: F401

    app(args=args)
