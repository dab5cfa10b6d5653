"""The command line, `diptych`: one file a group of commands, errors of one line."""

from __future__ import annotations

import sys

# Importing a module adds its commands.
from experiments.cli import demo, look, profiling, running  # noqa: F401
from experiments.cli.app import app, errors


def main() -> None:
    """Entry point. A mistake of the user's ends in one line on stderr and exit status 2, Ctrl-C in status 130."""
    sys.path.insert(0, "")  # so that module:Class finds a policy in the current folder
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        # What a user can cause is a ValueError or an OSError; what a policy, a model or a device does in mid-run is a
        # RuntimeError.
        if "--traceback" in sys.argv:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        hint = " (diptych --traceback ... shows where)" if isinstance(error, RuntimeError) else ""
        errors.print(f"diptych: {text}{hint}", style="red", markup=False)
        sys.exit(2)
