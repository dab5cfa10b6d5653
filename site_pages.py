"""Pages of the documentation that are written by the code: the command line, and the columns of a run's record.

A hook of MkDocs (mkdocs.yml); neither page is a file of the repository.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import typer
from mkdocs.structure.files import File, Files

from experiments.cli import load_commands
from experiments.cli.app import app
from policies import records


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages to the site."""
    for name, text in (("command-line.md", command_line()), ("records.md", record_columns())):
        files.append(File.generated(config, name, content=text))
    return files


def command_line() -> str:
    """Every command with its help and its options, in Markdown."""
    load_commands()
    group: Any = typer.main.get_command(app)
    parts = ["# The command line", "Every command is also explained by its own `--help`."]
    for name, command in _commands(group):
        context = command.make_context(name, [], resilient_parsing=True)
        usage = " ".join(command.collect_usage_pieces(context))
        parts += [f"## diptych {name}", f"```\ndiptych {name} {usage}\n```", _prose(command.help or "")]
        shown = [parameter.get_help_record(context) for parameter in command.params]
        rows = [_row(*record) for record in shown if record is not None]
        parts.append("\n".join(["| option | what it does |", "| --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def _commands(group: Any, of: str = "") -> Iterator[tuple[str, Any]]:
    """The commands of a group with those of groups in it, each by its whole name."""
    for name, command in sorted(group.commands.items()):
        yield of + name, command
        yield from _commands(command, f"{of}{name} ") if hasattr(command, "commands") else ()


def record_columns() -> str:
    """The tables of a run folder with types and what is said of each column, from `policies/records.py`."""
    source = inspect.getsource(records)
    parts = [
        "# A run's record",
        "A run folder has `run.json` (specification, limits, policies, versions, hardware) and three Parquet files, "
        "the same from both panels. Times are integer nanoseconds since the run began. A type that ends in `?` may be "
        "null.",
    ]
    for table in ("requests", "steps", "decisions"):
        block = re.search(rf"^{table.upper()}: .*?= {{\n(.*?)^}}\n\"\"\"(.*?)\"\"\"", source, re.DOTALL | re.MULTILINE)
        assert block is not None
        rows = [
            f"| `{name}` | `{kind}` | {_cell(comment or '')} |"
            for name, kind, comment in re.findall(r'"(\w+)": "([^"]+)",(?:  # (.*))?', block.group(1))
        ]
        parts += [
            f"## {table}.parquet",
            "\n".join(["| column | type | |", "| --- | --- | --- |", *rows]),
            block.group(2),
        ]
    return "\n\n".join(parts) + "\n"


def _row(names: str, what: str) -> str:
    return f"| `{names}` | {_cell(what)} |"


def _prose(text: str) -> str:
    """Help as it is written for a terminal: lines that are indented, or begin with the command's name, are commands."""
    paragraphs = inspect.cleandoc(text).replace("\b", "").split("\n\n")
    return "\n\n".join(f"```sh\n{p.strip()}\n```" if p.strip().startswith("diptych ") else p for p in paragraphs)


def _cell(text: str) -> str:
    return re.sub(r"([|<>\[\]])", r"\\\1", " ".join(text.split()))
