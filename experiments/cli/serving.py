"""`diptych serve` and `diptych engine`."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from experiments.cli import options
from experiments.cli.app import app, console
from experiments.cli.options import gather
from experiments.cli.summary import startup_line
from experiments.spec import RunSpec, SpecError
from policies.collecting import settle
from runtime.serving.heartbeat import MIN_TIMEOUT_SECONDS, TIMEOUT_SECONDS

if TYPE_CHECKING:
    from experiments.serving import ServeOptions
    from runtime.serving.messages import EngineInfo

Keys = Annotated[
    list[str] | None,
    typer.Option("--api-key", help="KEY or TENANT:KEY; may be repeated. Without one everybody is let in."),
]

Token = Annotated[
    str | None,
    typer.Option(envvar="DIPTYCH_TOKEN", help="Shared by a front and its engines elsewhere; 16 characters or more."),
]

HeartbeatTimeout = Annotated[
    float,
    typer.Option(
        min=MIN_TIMEOUT_SECONDS,
        help="Seconds without a sign of life after which front and engine give one another up.",
    ),
]

Replicas = Annotated[int | None, typer.Option(help="Engines, each in a process of its own, behind --router.")]
Replica = Annotated[
    list[str] | None,
    typer.Option(
        metavar="tcp://HOST:PORT",
        help="An engine that `diptych engine` has started; may be repeated. Without --replicas only these serve.",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Start the --replicas on the Ray cluster that this machine is in: auto, or HOST:PORT of its head.",
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")]
Admin = Annotated[bool, typer.Option(help="Offer the operator's endpoints, /admin/..., and keep recent steps.")]
AdminKey = Annotated[
    str | None, typer.Option(envvar="DIPTYCH_ADMIN_KEY", help="Their key; without one it is drawn and printed.")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the run's record (default: none).")]


@app.command()
def serve(
    context: typer.Context,
    spec: options.Spec = None,
    model: options.Model = None,
    tensor_parallel: options.TensorParallel = None,
    scheduler: options.Scheduler = None,
    queue: options.Queue = None,
    admission: options.Admission = None,
    preemption: options.Preemption = None,
    eviction: options.Eviction = None,
    offload: options.Offload = None,
    host_memory: options.HostMemory = None,
    disk: options.Disk = None,
    disk_folder: options.DiskFolder = None,
    replicas: Replicas = None,
    router: options.Router = None,
    replica: Replica = None,
    token: Token = None,
    ray: Ray = None,
    heartbeat_timeout: HeartbeatTimeout = TIMEOUT_SECONDS,
    seed: options.Seed = None,
    settings: options.Set = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65_535)] = 8000,
    served_model_name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    api_key: Keys = None,
    admin: Admin = False,
    admin_key: AdminKey = None,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait for their first token.", min=1)] = 1024,
    max_queue_tokens: Annotated[int, typer.Option(help="Prompt tokens of those.", min=1)] = 1_000_000,
    max_body_mib: Annotated[float, typer.Option(help="Of a request's body.", min=0.001)] = 16.0,
    request_timeout: Annotated[float, typer.Option(help="Seconds that a request may take; 0: any.", min=0)] = 600.0,
    drain: Annotated[float, typer.Option(help="Seconds that requests may go on after Ctrl-C.", min=0)] = 5.0,
    out: Out = None,
    overwrite: options.Overwrite = False,
    check: options.Check = False,
) -> None:
    """Serve a model over HTTP: OpenAI's API, streaming, metrics; the policies by the same flags as `diptych run`.

    Example: diptych serve --model SmolLM2-135M-Instruct --scheduler sarathi,chunk_size=256 --port 8000

    On several machines: DIPTYCH_TOKEN=... diptych serve --model M --replica tcp://10.0.0.7:7000
    --replica tcp://10.0.0.8:7000 --router least_tokens

    On a Ray cluster: diptych serve --model M --replicas 8 --ray auto --set model.device=cuda --router least_tokens
    """
    from experiments.hosting import EngineOptions  # torch is slow to import
    from experiments.replicas import Places
    from experiments.serving import ServeOptions
    from runtime.serving.service import EdgeLimits

    specification = _specification(context, spec, model)
    serving = ServeOptions(
        host=host,
        port=port,
        served_model_name=served_model_name,
        keys=tuple(api_key or ()),
        admin_keys=_admin_keys(admin, admin_key),
        edge=EdgeLimits(max_queue, max_queue_tokens, round(max_body_mib * 2**20), request_timeout),
        engine=EngineOptions(out, overwrite, keep_rows=admin, check=check),
        places=Places(
            tuple(replica or ()),
            started=replicas is not None or ray is not None or not replica,
            ray=ray,
            token=token,
            heartbeat_timeout_s=heartbeat_timeout,
        ),
        drain_s=drain,
    )

    _serve(specification, serving)
    console.print("ended" if out is None else f"ended. Records: {out}")


def _admin_keys(admin: bool, given: str | None) -> tuple[str, ...]:
    if given is not None and not admin:
        raise SpecError("--admin-key is the key of the operator's endpoints; give --admin too")
    if admin and given is None:
        given = secrets.token_urlsafe(24)
        console.print(f"admin key: {given}")
    return () if given is None else (given,)


def _serve(specification: RunSpec, serving: ServeOptions) -> None:
    """Until Ctrl-C, saying what is going on."""
    from experiments.serving import serve_spec
    from runtime.event_loop import run

    def on_ready(address: str, info: EngineInfo) -> None:
        settle()
        console.print(startup_line(info.startup_seconds))
        console.print(f"{info.model} in {info.dtype} on {info.device}, {info.limits.num_blocks} KV blocks", end="; ")
        console.print(", ".join(f"{role} {policy}" for role, policy in info.stack.items()))
        console.print(f"serving on {address} (Ctrl-C ends it)")

    places = serving.places
    if places.attached:
        console.print(f"attaching {', '.join(places.attached)}")
    if places.started:
        on = "" if places.ray is None else f" on the Ray cluster {places.ray}"
        console.print(f"loading {specification.model.source}{on}")
    run(serve_spec(specification, serving, on_ready))


@app.command()
def engine(
    context: typer.Context,
    listen: Annotated[
        str, typer.Option(metavar="tcp://HOST:PORT", help="Address of this machine on a private network.")
    ],
    spec: options.Spec = None,
    model: options.Model = None,
    tensor_parallel: options.TensorParallel = None,
    scheduler: options.Scheduler = None,
    queue: options.Queue = None,
    admission: options.Admission = None,
    preemption: options.Preemption = None,
    eviction: options.Eviction = None,
    offload: options.Offload = None,
    host_memory: options.HostMemory = None,
    disk: options.Disk = None,
    disk_folder: options.DiskFolder = None,
    seed: options.Seed = None,
    settings: options.Set = None,
    token: Token = None,
    heartbeat_timeout: HeartbeatTimeout = TIMEOUT_SECONDS,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for a record of each session (default: none).")
    ] = None,
    overwrite: options.Overwrite = False,
    check: options.Check = False,
) -> None:
    """Start an engine on this machine for a `diptych serve` on another, which attaches it with --replica.

    It serves one front. When that has gone, it drops what the front had under way and starts afresh for the next one.

    Example: diptych engine --model SmolLM2-135M-Instruct --listen tcp://10.0.0.7:7000
    (with the token in $DIPTYCH_TOKEN)
    """
    from experiments.hosting import EngineOptions  # torch is slow to import
    from experiments.replicas import host_spec
    from runtime.event_loop import run

    specification = _specification(context, spec, model)
    if token is None:
        raise SpecError("an engine needs a token, which its front must know: --token or $DIPTYCH_TOKEN")
    engine_options = EngineOptions(out, overwrite, keep_rows=True, check=check)

    def tell(event: str, detail: str) -> None:
        console.print(
            {
                "listening": f"listening on {detail} (Ctrl-C ends it); loading {specification.model.source}",
                "ready": "ready",
                "attached": "a front has attached",
                "over": f"the session is over: {detail}",
                "ended": "ended" if out is None else f"ended. Records: {out}",
            }[event]
        )

    run(host_spec(specification, engine_options, listen, token, tell, heartbeat_timeout))


def _specification(context: typer.Context, spec: Path | None, model: str | None) -> RunSpec:
    """What is served comes over HTTP, but a specification has a workload."""
    fields = {} if spec is not None else {"workload__name": "fixed", "workload__n": 1}
    return gather(context, model__source=model, **fields)
