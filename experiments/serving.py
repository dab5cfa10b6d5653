"""`diptych serve`: the engines of a specification behind the HTTP server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from experiments.hosting import EngineOptions
from experiments.replicas import Places, start_engines
from experiments.spec import RunSpec
from runtime.event_loop import allow_many_connections
from runtime.serving.app import build_app
from runtime.serving.keys import Keys
from runtime.serving.messages import EngineInfo
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
        places: where the replicas are.
        drain_s: how long requests may go on once the server is asked to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    edge: EdgeLimits = field(default_factory=EdgeLimits)
    engine: EngineOptions = field(default_factory=EngineOptions)
    places: Places = field(default_factory=Places)
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
        client = await start_engines(spec, options.engine, options.places)
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
