"""The command line, `diptych`: one file a group of commands, errors of one line."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from typer.models import CommandInfo, TyperInfo

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


COMMANDS = (
    *("bench", "capacity", "demo", "look", "plotting", "profiling", "published", "running", "serving", "sweeping"),
    *("tracing", "tuning", "validating"),
)
"""Modules that add commands."""


CONTENTS = {
    "Both panels": ("demo", "run", "simulate", "compare", "replay", "validate", "profile"),
    "Serve": ("serve", "engine", "bench"),
    "Experiment": ("sweep", "capacity", "tune", "published"),
    "Look": ("dashboard", "plot", "policies", "trace", "trace-export"),
}
"""Heading -> commands, as `diptych --help` lists them."""


def load_commands() -> None:
    """Import the modules that add their commands to `app`. Not on import of this one: it takes its time."""
    for name in COMMANDS:
        import_module(f"experiments.cli.{name}")
    places = {name: heading for heading, names in CONTENTS.items() for name in names}
    listed: list[CommandInfo | TyperInfo] = [*app.registered_commands, *app.registered_groups]
    for info in listed:
        info.rich_help_panel = places[_name_of(info)]
    order = list(places)
    app.registered_commands.sort(key=lambda info: order.index(_name_of(info)))


def _name_of(info: CommandInfo | TyperInfo) -> str:
    """As it is typed."""
    return info.name or getattr(info.callback, "__name__", "").replace("_", "-")


def _run(args: list[str]) -> None:
    if int(os.environ.get("RANK", "0")) and "TORCHELASTIC_RUN_ID" in os.environ:  # torch is slow to import
        _follow()
    load_commands()  # here, where Ctrl-C may come
    app(args=args)


def _follow() -> None:
    """torchrun has started this process to follow the first one, which does what the command line says."""
    from runtime.parallel import follower, torchrun

    job = torchrun.job()
    assert job is not None
    follower.follow(job)
