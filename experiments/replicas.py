"""Where the replicas of `diptych serve` are: on this machine, at addresses, or on a Ray cluster."""

from __future__ import annotations

import asyncio
import functools
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from experiments.hosting import EngineOptions, host_engine
from experiments.spec import RunSpec, SpecError
from policies import registry
from runtime.serving import ray_link
from runtime.serving.coordinator import Coordinator
from runtime.serving.engine_client import EngineClient, EngineStartError
from runtime.serving.engine_host import host_session
from runtime.serving.engine_proxy import EngineProxy
from runtime.serving.heartbeat import TIMEOUT_SECONDS, check_timeout
from runtime.serving.link import Link
from runtime.serving.local_link import LocalLink
from runtime.serving.ray_link import RayLink
from runtime.serving.remote_link import RemoteLink
from runtime.serving.tcp_socket import check_address, key_pair


@dataclass(frozen=True, slots=True)
class Places:
    """Attributes:
    attached: addresses of engines that were started elsewhere; they are the replicas after the started ones.
    started: whether the specification's replicas are started, or only those that are attached serve.
    ray: address of the Ray cluster where they are started; None: on this machine.
    token: shared with the attached engines.
    heartbeat_timeout_s: seconds without a sign of life after which an engine, wherever it is, counts as dead.
    """

    attached: tuple[str, ...] = ()
    started: bool = True
    ray: str | None = None
    token: str | None = None
    heartbeat_timeout_s: float = TIMEOUT_SECONDS

    def __post_init__(self) -> None:
        check_timeout(self.heartbeat_timeout_s)
        if self.ray is not None:
            ray_link.check_address(self.ray)
        if not self.attached:
            return
        if self.token is None:
            raise SpecError("engines elsewhere need the token that they were started with: --token or $DIPTYCH_TOKEN")
        key_pair(self.token, "front")
        for address in self.attached:
            check_address(address)


def check_served_router(router: str) -> None:
    """Raise SpecError for a router that no server can have."""
    if registry.moves_kv(registry.find("router", registry.PolicySpec.parse(router).name)):
        raise SpecError(
            f"router {router} moves KV cache between replicas, which is for simulations so far: "
            "try it with `diptych simulate`, or serve with another one, as kv_aware"
        )


async def start_engines(spec: RunSpec, options: EngineOptions, places: Places) -> EngineClient:
    """One engine on this machine, or several of any kind behind the specification's router.

    Raises EngineStartError, and for a Ray cluster that cannot be joined ValueError or ConnectionError.
    """
    spec.check_for_real()
    check_served_router(spec.policies.router)
    if spec.replicas == 1 and not places.attached and places.ray is None:
        link: Link = LocalLink(functools.partial(host_engine, spec, options))
        return await EngineProxy.start(link, places.heartbeat_timeout_s)
    if places.ray is not None:
        await asyncio.to_thread(ray_link.connect, places.ray)
    num_started = spec.replicas if places.started else 0
    starts: Counter[int] = Counter()

    async def start(number: int) -> EngineProxy:
        starts[number] += 1
        link = _link(number, starts[number], num_started, spec, options, places)
        return await EngineProxy.start(link, places.heartbeat_timeout_s)

    name = spec.policies.router
    router = registry.make("router", name, seed=spec.seed, block_size=spec.limits.block_size)
    return await Coordinator.start(num_started + len(places.attached), router, name, start)


def _link(number: int, nth: int, num_started: int, spec: RunSpec, options: EngineOptions, places: Places) -> Link:
    """To a replica's nth engine. First come those that are started, then the attached, then those that join."""
    is_attached = num_started <= number < num_started + len(places.attached)
    if is_attached and places.token is not None:
        return RemoteLink(places.attached[number - num_started], places.token)
    if not places.started:
        raise EngineStartError(
            "all replicas of this server are attached by address; name another with --replica at its start"
        )
    model, options = spec.model, replace(options, record=_record(options.record, "replica", number, nth))
    if places.ray is not None:
        options, on_gpu = _anywhere(options), model.device.startswith("cuda")
        device = "cuda" if on_gpu else model.device  # Ray shows each engine its own cards alone
        model = model.model_copy(update={"source": _absolute(model.source), "device": device})
    elif model.device == "cuda":  # cards of its own
        index = number if number < num_started else number - len(places.attached)
        model = model.model_copy(update={"device": f"cuda:{index * model.tensor_parallel}"})
    own = spec.model_copy(update={"model": model, "seed": spec.seed + number})  # or they would draw alike
    launch = functools.partial(host_engine, own, options)
    if places.ray is not None:
        return RayLink(launch, places.heartbeat_timeout_s, num_gpus=model.tensor_parallel if on_gpu else 0)
    return LocalLink(launch)


def _anywhere(options: EngineOptions) -> EngineOptions:
    """For a process that is in another folder."""
    return options if options.record is None else replace(options, record=options.record.absolute())


def _absolute(source: str) -> str:
    """A model's folder or file by its whole path; what is none stays as it is."""
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else source


def _record(folder: Path | None, what: str, number: int, nth: int = 1) -> Path | None:
    """Where an engine records: `replica-1`, after a restart `replica-1.2`, ... None is written to twice."""
    return None if folder is None else folder / (f"{what}-{number}" if nth == 1 else f"{what}-{number}.{nth}")


async def host_spec(
    spec: RunSpec,
    options: EngineOptions,
    address: str,
    token: str,
    tell: Callable[[str, str], None],
    heartbeat_timeout_s: float = TIMEOUT_SECONDS,
) -> None:
    """`diptych engine`: one session after another, each recorded on its own, until SIGINT or SIGTERM.

    `tell`, `heartbeat_timeout_s`: as `runtime.serving.engine_host.host_session` has them. Raises EngineStartError,
    OSError, ValueError.
    """
    check_address(address)
    check_timeout(heartbeat_timeout_s)
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for one in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(one, task.cancel)
    try:
        for number in count():
            own = replace(options, record=_record(options.record, "session", number))
            await host_session(address, token, functools.partial(host_engine, spec, own), tell, heartbeat_timeout_s)
    except asyncio.CancelledError:
        tell("ended", "")
