"""The application that commands add themselves to."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from experiments.cli.failures import INTERRUPTED

# What users type may look like markup or an emoji's name, and is to come out as it was typed.
console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
errors = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)


class _Group(TyperGroup):
    """Commands that say so when they are interrupted."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Group,
    help="One LLM-serving policy in two panels: a real runtime and a simulation of it, side by side.\n\n"
    "Start with: diptych demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def complain(text: str) -> None:
    """One line on stderr."""
    errors.print(f"diptych: {text}", style="red")


def _show_version(asked: bool) -> None:
    if asked:
        from experiments.records.environment import version_line  # PyArrow, which --help has no use for

        console.print(version_line())
        raise typer.Exit


@app.callback()
def common(
    version: bool = typer.Option(
        False,
        "--version",
        callback=_show_version,
        is_eager=True,
        help="Say version, revision, Python, PyTorch and device, and exit.",
    ),
    traceback: bool = typer.Option(
        False, "--traceback", help="Show Python's traceback of an error; may also follow the command."
    ),
) -> None:
    """Options of every command."""
