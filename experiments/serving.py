"""`diptych serve`: the engine of a specification in a process of its own, recorded if asked, behind the HTTP server."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from experiments.records import RunWriter, run_info
from experiments.spec import RunSpec
from policies import registry
from policies.contract import Recorder
from runtime.event_loop import allow_many_connections
from runtime.serving.app import build_app
from runtime.serving.commands import Hosted
from runtime.serving.coordinator import Coordinator
from runtime.serving.engine_client import EngineClient
from runtime.serving.engine_proxy import EngineProcess
from runtime.serving.keys import Keys
from runtime.serving.messages import EngineInfo
from runtime.serving.recent_rows import RecentRows
from runtime.serving.server import address_of, bind, serve
from runtime.serving.service import EdgeLimits, Service
from runtime.serving.text import TextCodec
from runtime.weights import load_tokenizer


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How a specification's model is served.

    Attributes:
        served_model_name: what clients call the model; None: its own name.
        keys, admin_keys: as `runtime.serving.keys.Keys` takes them; without admin keys an operator can do nothing.
        record: folder of the run's record; None: none is written.
        check: verify the control plane's invariants after every step.
        drain_s: how long requests may go on once the server is asked to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    edge: EdgeLimits = field(default_factory=EdgeLimits)
    record: Path | None = None
    overwrite: bool = False
    check: bool = False
    drain_s: float = 5.0


async def serve_spec(
    spec: RunSpec, options: ServeOptions, on_ready: Callable[[str, EngineInfo], None] = lambda address, info: None
) -> None:
    """Serve until a signal ends it. `on_ready` gets the address once requests are taken.

    Raises OSError where the port is taken, EngineStartError where the engine does not start, ValueError for bad keys.
    """
    keys, admin_keys = Keys(options.keys), Keys(options.admin_keys)
    allow_many_connections()
    with bind(options.host, options.port) as bound:
        client = await _start_engines(spec, options)
        try:
            tokenizer = load_tokenizer(spec.model.source, load_format=spec.model.load_format)
            name = options.served_model_name or client.info.model
            codec = TextCodec(tokenizer, client.info.vocab_size, name)
            service = Service(client, codec, name, options.edge)
            app = build_app(service, keys=keys, admin_keys=admin_keys)
            await serve(
                app,
                service,
                bound,
                drain_s=options.drain_s,
                on_ready=lambda: on_ready(address_of(bound), client.info),
            )
        finally:
            await client.close()


async def _start_engines(spec: RunSpec, options: ServeOptions) -> EngineClient:
    """One engine, or several behind the specification's router: each on a card of its own, if on cards."""
    if spec.replicas == 1:
        return await EngineProcess.start(functools.partial(host_engine, spec, options))

    starts: Counter[int] = Counter()

    def start(number: int) -> Awaitable[EngineProcess]:
        device = f"cuda:{number}" if spec.model.device == "cuda" else spec.model.device
        model = spec.model.model_copy(update={"device": device})
        own = spec.model_copy(update={"model": model, "seed": spec.seed + number})  # or they would draw alike
        starts[number] += 1
        record = record_folder(options, number, starts[number])
        return EngineProcess.start(functools.partial(host_engine, own, replace(options, record=record)))

    name = spec.policies.router
    router = registry.make("router", name, seed=spec.seed, block_size=spec.limits.block_size)
    return await Coordinator.start(spec.replicas, router, name, start)


def record_folder(options: ServeOptions, number: int, nth: int) -> Path | None:
    """Where a replica's nth engine records: `replica-1`, `replica-1.2`, ... A server writes to none of them twice."""
    if options.record is None:
        return None
    return options.record / (f"replica-{number}" if nth == 1 else f"replica-{number}.{nth}")


@contextmanager
def host_engine(spec: RunSpec, options: ServeOptions, on_flush: Callable[[], None]) -> Iterator[Hosted]:
    """In the engine's process: load the model, start the engine, keep the record."""
    from experiments.real import load, prepare, start_engine  # torch, which the front does not need

    loaded = replace(load(spec.model), tokenizer=None)  # text is the front's
    prepared = prepare(spec, loaded)
    limits, stack = prepared.limits, spec.policies.stack
    policies = stack.build(block_size=limits.block_size, seed=spec.seed)
    writer: RunWriter | None = None
    if options.record is not None:
        info = run_info(
            "real",
            spec=spec.model_dump(mode="json", exclude={"workload"}),
            limits=asdict(limits),
            stack=stack.as_dict(),
            clairvoyant=policies.clairvoyant,
            workload={"name": "served"},
            model=loaded.name,
            **({} if prepared.cost is None else {"cost": prepared.cost.describe()}),
        )
        writer = RunWriter(options.record, info, overwrite=options.overwrite, decisions=spec.decisions)
    rows = RecentRows(writer) if options.admin_keys else None
    recorder: Recorder | None = rows or writer
    with (
        writer or nullcontext(),
        start_engine(
            loaded,
            limits,
            policies,
            prepared.spec.model,
            recorder=recorder,
            cost=prepared.cost,
            seed=spec.seed,
            check=options.check,
            on_flush=on_flush,
        ) as engine,
    ):
        about = EngineInfo(
            loaded.name,
            loaded.config.vocab_size,
            limits,
            stack.as_dict(),
            {**prepared.seconds, **engine.startup_seconds},
            spec.model.device,
            spec.model.dtype,
            os.getpid(),
            None if options.record is None else str(options.record),
        )
        yield Hosted(engine, about, stack, spec.seed, rows)
