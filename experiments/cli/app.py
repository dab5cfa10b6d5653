"""The application that commands add themselves to."""

from __future__ import annotations

import typer
from rich.console import Console

app = typer.Typer(
    help="One LLM-serving policy in two panels: a real runtime and a simulation of it, side by side.\n\n"
    "Start with: diptych demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
INTERRUPTED = 130
console = Console()
errors = Console(stderr=True, soft_wrap=True, highlight=False)


@app.callback()
def common(traceback: bool = typer.Option(False, "--traceback", help="Show Python's traceback of an error.")) -> None:
    """Options before the command."""
