"""What an operator may do to the live server. Behind a key of its own, and there only if the server was told so."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Query

from policies import registry
from policies.contract import Router
from runtime.serving import info
from runtime.serving.coordinator import Coordinator
from runtime.serving.engine_client import CommandFailed, EngineGone, EngineStartError
from runtime.serving.errors import ApiError
from runtime.serving.event_log import EventLog
from runtime.serving.protocol import PoliciesBody
from runtime.serving.service import Service

Answer = TypeVar("Answer")


def router(service: Service) -> APIRouter:
    """The endpoints, for this service."""
    routes = APIRouter(tags=["Operator"])
    _steps_and_requests(routes, service)
    _policies(routes, service)
    _replicas(routes, service)
    _records(routes, service)
    return routes


async def _command(service: Service, name: str, **arguments: Any) -> Any:
    try:
        return await service.client.command(name, arguments)
    except CommandFailed as error:
        raise ApiError(400, str(error)) from None
    except EngineGone as gone:
        raise ApiError(503, str(gone)) from None


def _several(service: Service) -> Coordinator:
    if not isinstance(service.client, Coordinator):
        raise ApiError(400, "this server has one engine, and no router; start it with --replicas 2 or more", "router")
    return service.client


def _steps_and_requests(routes: APIRouter, service: Service) -> None:
    @routes.post("/admin/drain")
    async def drain() -> dict[str, Any]:
        """Take no new requests; those that are here go on."""
        service.draining = True
        return {"draining": True, "live": service.client.num_live}

    @routes.post("/admin/undrain")
    async def undrain() -> dict[str, Any]:
        """Take requests again."""
        service.draining = False
        return {"draining": False, "live": service.client.num_live}

    @routes.post("/admin/pause")
    async def pause() -> Any:
        """Run no more steps; requests keep their places and their memory."""
        return await _command(service, "hold")

    @routes.post("/admin/resume")
    async def resume() -> Any:
        """End a pause."""
        return await _command(service, "release")

    @routes.post("/admin/flush_prefix_cache")
    async def flush_prefix_cache() -> Any:
        """Forget cached blocks that no request holds."""
        return await _command(service, "flush")

    @routes.post("/flush_cache")
    async def flush_cache() -> Any:
        """The same, under SGLang's name."""
        return await _command(service, "flush")


def _policies(routes: APIRouter, service: Service) -> None:
    @routes.post("/admin/policies")
    async def policies(body: PoliciesBody) -> Any:
        """Let other policies decide from the next step on; requests that are here stay."""
        changes = body.changes
        name = changes.pop("router", None)
        if name is None:
            return await _command(service, "change_policies", **changes)
        replicas = _several(service)
        new = _new_router(replicas, name)
        answer = await _command(service, "change_policies", **changes) if changes else {}
        replicas.change_router(new, name)
        return {**answer, "router": name}


def _new_router(replicas: Coordinator, name: str) -> Router:
    """Made before anything is changed, so that one that cannot be made changes nothing. Raises ApiError."""
    try:
        moves_kv = registry.moves_kv(registry.find("router", registry.PolicySpec.parse(name).name))
        if not moves_kv:
            new: Router = registry.make("router", name, seed=0, block_size=replicas.info.limits.block_size)
            return new
    except registry.PolicyError as error:
        raise ApiError(400, str(error), "router") from None
    except (Exception, SystemExit) as error:  # of a module or a constructor that is not ours
        reason = f"router {name} cannot be made: {type(error).__name__}: {error}"
        raise ApiError(400, reason, "router") from error
    raise ApiError(400, f"router {name} moves KV between replicas: for simulations so far", "router")


def _replicas(routes: APIRouter, service: Service) -> None:
    def draining(number: int, draining: bool) -> dict[str, Any]:
        try:
            _several(service).set_draining(number, draining)
        except CommandFailed as error:
            raise ApiError(404, str(error)) from None
        return {"replica": number, "draining": draining}

    async def started(starting: Awaitable[Answer]) -> Answer:
        try:
            return await starting
        except CommandFailed as error:
            raise ApiError(404, str(error)) from None
        except EngineStartError as error:
            raise ApiError(503, str(error)) from None

    @routes.post("/admin/replicas")
    async def join() -> dict[str, int]:
        """Start one more replica; answers once it takes requests."""
        return {"replica": await started(_several(service).join())}

    @routes.post("/admin/replicas/{number}/drain")
    async def drain_replica(number: int) -> dict[str, Any]:
        """Route nothing more to this replica; what it has goes on."""
        return draining(number, True)

    @routes.post("/admin/replicas/{number}/undrain")
    async def undrain_replica(number: int) -> dict[str, Any]:
        """Route to this replica again."""
        return draining(number, False)

    @routes.post("/admin/replicas/{number}/restart")
    async def restart_replica(number: int) -> dict[str, int]:
        """Put a fresh engine in this replica's place, dead or alive; answers once it takes requests."""
        await started(_several(service).restart(number))
        return {"replica": number}


def _records(routes: APIRouter, service: Service) -> None:
    limits = service.client.info.limits
    log = EventLog(limits.block_size if limits.prefix_caching else None, limits.max_total_tokens)
    service.metrics.events = log

    @routes.get("/admin/server_info")
    async def server_info() -> dict[str, Any]:
        """What `/server_info` says, and of each engine its process and the folder of its record."""
        return info.describe(service)

    @routes.get("/admin/record")
    async def record(
        table: Literal["steps", "decisions"] = "steps",
        since_step: Annotated[int, Query(ge=0, le=2**62)] = 0,
        limit: Annotated[int, Query(ge=1, le=100_000)] = 1000,
    ) -> Any:
        """The newest rows of the record in memory, from a step on."""
        return await _command(service, "record", table=table, since_step=since_step, limit=limit)

    @routes.get("/admin/events")
    async def events(
        after: Annotated[int, Query(ge=-1, le=2**62)] = -1,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    ) -> dict[str, Any]:
        """Arrivals and ends of requests with numbers above `after`, those alive, and what the engines hold just now."""
        return {
            **log.page(after, limit),
            "now_ns": log.now_ns(),
            "output_tokens": service.metrics.num_output_tokens,
            "alive": service.metrics.alive(),
            "stack": service.client.info.stack,
            "router": service.client.router_name if isinstance(service.client, Coordinator) else None,
            "engines": [
                {
                    "id": engine.id,
                    "state": engine.state,
                    "running": engine.stats.num_running,
                    "waiting": engine.stats.num_waiting,
                    "num_blocks": engine.info.limits.num_blocks,
                    "free_blocks": engine.stats.num_free_blocks if engine.stats.num_steps else None,
                }
                for engine in service.client.engines
            ],
        }
