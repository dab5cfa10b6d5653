"""The flags that describe a run, shared by the commands that make one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.cli.app import complain, console
from experiments.cli.failures import INTERRUPTED
from experiments.pool_spec import read_pool
from experiments.spec import RunSpec, SpecError, check_spec, read_spec
from policies import registry

Spec = Annotated[Path | None, typer.Argument(help="A YAML file with the specification; flags win over it.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run (runs/WORKLOAD-SCHEDULER-PANEL).")]
Overwrite = Annotated[bool, typer.Option(help="Replace a run that the folder holds.")]
Check = Annotated[
    bool,
    typer.Option(help="Verify the control plane's invariants after every step (slow), and Little's law at the end."),
]
ResultFolder = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the results (sweeps/FILE).")]
Processes = Annotated[
    int | None, typer.Option(help="Simulations at once (one a core). Real runs go one by one.", min=1)
]
RayAddress = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Run them on a Ray cluster: auto, or its head's HOST:PORT.")
]
Workload = Annotated[
    str | None,
    typer.Option("--workload", "-w", help="A generator (chat, code, prefix-chat, ...) or a trace file."),
]
Requests = Annotated[int | None, typer.Option("--requests", "-n", help="How many requests.")]
Rate = Annotated[float | None, typer.Option(help="Mean requests a second.")]
Seed = Annotated[int | None, typer.Option(help="Of the workload, the prompts and the sampling.")]
Scheduler = Annotated[str | None, typer.Option("--scheduler", "-s", help="name,knob=value,... or module:Class.")]
Queue = Annotated[str | None, typer.Option(help="Order of the waiting requests.")]
Admission = Annotated[str | None, typer.Option(help="When memory may be promised.")]
Preemption = Annotated[str | None, typer.Option(help="Whom to take memory from.")]
Eviction = Annotated[str | None, typer.Option(help="Which idle cached block goes.")]
Offload = Annotated[str | None, typer.Option(help="Which cached prefixes are kept in host memory.")]
Router = Annotated[str | None, typer.Option(help="Which replica gets a request.")]
Autoscaler = Annotated[str | None, typer.Option(help="How many replicas there are, with time.")]
Pool = Annotated[
    list[str] | None,
    typer.Option(
        "--pool",
        help="Replicas that are alike, in place of --replicas: NAME,replicas=2,device=h200,role=prefill,"
        "limits.max_num_seqs=64,policies.scheduler=sarathi/chunk_size=512; may be repeated.",
    ),
]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Folder, GGUF file, hub id or preset.")]
TensorParallel = Annotated[
    int | None,
    typer.Option(metavar="N", help="Split each layer over N devices of this machine, from model.device on."),
]
HostMemory = Annotated[
    float | None,
    typer.Option(
        help="GiB of host memory for the KV of preempted requests, with --preemption NAME,mode=swap, and of "
        "prefixes, with --offload (in blocks: --set limits.num_host_blocks=N)."
    ),
]
Disk = Annotated[
    float | None,
    typer.Option(
        help="GiB of disk behind host memory for prefixes, with --offload (in blocks: --set limits.num_disk_blocks=N)."
    ),
]
DiskFolder = Annotated[
    str | None, typer.Option(help="Where those lie; cleared at the start and at the end. A simulation needs none.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other field of the specification, as limits.lag=0; may be repeated."),
]


FIELDS: dict[str, tuple[str, ...]] = {
    "workload": ("workload.name",),
    "requests": ("workload.n",),
    "rate": ("workload.rate",),
    "seed": ("workload.seed", "seed"),
    "replicas": ("replicas",),
    "tensor_parallel": ("model.tensor_parallel",),
    "link": ("link.bandwidth",),
    "host_memory": ("limits.host_memory_gib",),
    "disk": ("limits.disk_gib",),
    "disk_folder": ("limits.disk_folder",),
    **{role: (f"policies.{role}",) for role in registry.ROLES},
}
"""Flag -> the fields of the specification that it sets, where that is the same for all commands."""


def gather(context: typer.Context, **fields: object) -> RunSpec:
    """The specification of a command: its file, then its flags, then `fields` (dots written as __), then its `--set`s.

    Raises SpecError with the first thing that is wrong.
    """
    over: dict[str, Any] = {}
    for flag, value in context.params.items():
        for field in FIELDS.get(flag, ()):
            if value is not None:
                _put(over, field, value)
    for name, value in fields.items():
        if value is not None:
            _put(over, name.replace("__", "."), value)
    for setting in context.params.get("settings") or ():
        field, equals, text = setting.partition("=")
        if not equals or not field:
            raise SpecError(f"--set {setting}: write FIELD=VALUE, as limits.lag=0")
        try:
            _put(over, field.strip(), yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise SpecError(f"--set {setting}: the value is not valid YAML") from error
    pools = context.params.get("pools")
    if pools:
        try:
            _put(over, "pools", [read_pool(text) for text in pools])
        except ValueError as error:
            raise SpecError(f"--pool: {error}") from None
    spec = context.params.get("spec")
    if spec is not None:
        return read_spec(spec, over)
    if "workload" not in over:
        raise SpecError("say what to serve: a specification file, or --workload chat --requests 100")
    return check_spec(over, "flags")


def _put(tree: dict[str, Any], field: str, value: object) -> None:
    *path, last = field.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise SpecError(f"--set {field}: {part} is no group of fields")
    tree[last] = value


def default_folder(spec: RunSpec, suffix: str) -> Path:
    """runs/WORKLOAD-SCHEDULER-suffix."""
    scheduler = spec.policies.scheduler.split(",")[0].rsplit(":", 1)[-1]
    return folder_of(spec, f"{scheduler}-{suffix}")


def folder_of(spec: RunSpec, suffix: str) -> Path:
    """runs/WORKLOAD-suffix."""
    return Path("runs") / f"{Path(spec.workload.name).name.split('.')[0]}-{suffix}"


@contextmanager
def interruptible(folder: Path) -> Iterator[None]:
    """On Ctrl-C say where the record is that was written so far, and end with the status that shells expect."""
    before = _version(folder / "run.json")
    try:
        yield
    except KeyboardInterrupt:
        recorded = _version(folder / "run.json") not in (None, before)
        known = f"what was recorded until then is in {folder}" if recorded else "nothing was recorded yet"
        complain(f"interrupted; {known}")
        raise typer.Exit(INTERRUPTED) from None


def _version(path: Path) -> tuple[int, int] | None:
    """Differs once the file is replaced; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def make_parent(path: Path) -> None:
    """See that a file can be written, before the work whose result it takes."""
    if path.is_dir():
        raise SpecError(f"{path} is a folder; give a file's name")
    path.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def progress(text: str, total: float | None) -> Iterator[Progress]:
    """A bar with one task, id 0."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        bar.add_task(text, total=total)
        yield bar


OBJECTIVES = ("ttft", "tpot", "e2el")
Goodput = Annotated[
    list[str] | None, typer.Option(help="An objective in ms, as ttft:200, tpot:50 or e2el:5000; may be repeated.")
]


def objectives(given: list[str]) -> dict[str, float]:
    """What --goodput says: name -> milliseconds. Raises SpecError."""
    found = {}
    for objective in given:
        name, _, value = objective.partition(":")
        try:
            found[name] = float(value)
        except ValueError:
            raise SpecError(f"--goodput {objective}: write an objective in milliseconds, as ttft:200") from None
        if name not in OBJECTIVES:
            raise SpecError(f"--goodput {objective}: there is no objective {name!r}; give {', '.join(OBJECTIVES)}")
        if not 0 <= found[name] < float("inf"):
            raise SpecError(f"--goodput {objective}: an objective is a number of milliseconds, 0 or more")
    return found


# How a command that sends requests to a server has them made.
Tokenizer = Annotated[
    Path | None, typer.Option(help="For prompts to a server: a folder with tokenizer.json; else the server is asked.")
]
VocabSize = Annotated[int | None, typer.Option(help="Send a server random token ids below it.")]
ApiKey = Annotated[str | None, typer.Option(help="Sent to a server as a bearer token.", envvar="OPENAI_API_KEY")]
