"""What an operator may do to the live server. Behind a key of its own, and there only if the server was told so."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query

from runtime.serving.engine_client import CommandFailed, EngineGone
from runtime.serving.errors import ApiError
from runtime.serving.protocol import PoliciesBody
from runtime.serving.service import Service


def router(service: Service) -> APIRouter:
    """The endpoints, for this service."""
    routes = APIRouter(tags=["Operator"])

    async def command(name: str, **arguments: Any) -> Any:
        try:
            return await service.client.command(name, arguments)
        except CommandFailed as error:
            raise ApiError(400, str(error)) from None
        except EngineGone as gone:
            raise ApiError(503, str(gone)) from None

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
        return await command("hold")

    @routes.post("/admin/resume")
    async def resume() -> Any:
        """End a pause."""
        return await command("release")

    @routes.post("/admin/flush_prefix_cache")
    async def flush_prefix_cache() -> Any:
        """Forget cached blocks that no request holds."""
        return await command("flush")

    @routes.post("/flush_cache")
    async def flush_cache() -> Any:
        """The same, under SGLang's name."""
        return await command("flush")

    @routes.post("/admin/policies")
    async def policies(body: PoliciesBody) -> Any:
        """Let other policies decide from the next step on; requests that are here stay."""
        return await command("swap", **body.changes)

    @routes.get("/admin/record")
    async def record(
        table: Literal["steps", "decisions"] = "steps",
        since_step: Annotated[int, Query(ge=0, le=2**62)] = 0,
        limit: Annotated[int, Query(ge=1, le=100_000)] = 1000,
    ) -> Any:
        """The newest rows of the record in memory, from a step on."""
        return await command("record", table=table, since_step=since_step, limit=limit)

    return routes
