"""What the server says about itself: models, health, metrics, version, settings and where the host's time goes."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from runtime.engine_stats import EngineStats
from runtime.serving.coordinator import Coordinator
from runtime.serving.engine_client import EngineView
from runtime.serving.errors import ApiError
from runtime.serving.service import Service

PRIVATE = frozenset({"pid", "record_folder", "cost"})
"""Of an engine: nobody's affair but the operator's."""


def router(service: Service) -> APIRouter:
    """The endpoints, for this service."""
    routes = APIRouter(tags=["Server"])

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [_card(service)]}

    @routes.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """The model, if it is the one that is served."""
        service.check_model(model)
        return _card(service)

    @routes.get("/model_info")
    async def model_info() -> dict[str, Any]:
        """As SGLang's benchmark asks for it."""
        return {"model_path": service.client.info.model, "is_generation": True, "served_model_name": service.model}

    @routes.get("/health", response_model=None)
    async def health() -> Response:
        """200 while the engine lives, also when it is being drained; else 503."""
        if service.client.error is not None:
            return JSONResponse(ApiError(503, service.client.error).body(), 503)
        return Response(status_code=200)

    @routes.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/version")
    async def the_version() -> dict[str, str]:
        """Of Diptych."""
        return {"version": _version()}

    @routes.get("/server_info")
    async def server_info() -> dict[str, Any]:
        """Settings, policies, queues, and the mean host and device time of a step."""
        return describe(service, PRIVATE)

    return routes


def describe(service: Service, hidden: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Settings, policies, queues, and the mean host and device time of a step; of engines without what is `hidden`."""
    queued, queued_tokens = service.client.num_queued
    return {
        "version": _version(),
        "model": service.model,
        "edge": asdict(service.limits),
        "draining": service.draining,
        "error": service.client.error,
        "live": service.client.num_live,
        "queued": queued,
        "queued_tokens": queued_tokens,
        **({"router": service.client.router_name} if isinstance(service.client, Coordinator) else {}),
        "engines": [_engine(engine, hidden) for engine in service.client.engines],
    }


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "diptych",
        "root": service.client.info.model,
        "max_model_len": service.client.info.limits.max_total_tokens,
    }


def _engine(engine: EngineView, hidden: frozenset[str]) -> dict[str, Any]:
    stats = engine.stats
    return {
        "id": engine.id,
        "state": engine.state,
        "error": engine.error,
        **{name: value for name, value in asdict(engine.info).items() if name not in hidden},
        "max_total_tokens": engine.info.limits.max_total_tokens,
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "steps": _steps(stats),
    }


def _steps(stats: EngineStats) -> dict[str, Any]:
    """Microseconds a step of the host's work by part, and of the device."""
    count = max(1, stats.num_steps)
    by_part = {part: round(ns / count / 1e3, 1) for part, ns in stats.host_ns.items() if part not in ("wait", "idle")}
    return {
        "count": stats.num_steps,
        "computed_tokens": stats.num_computed_tokens,
        "host_us": round(sum(by_part.values()), 1),
        "host_us_by_part": by_part,
        "device_us": round(stats.device_ns / count / 1e3, 1),
    }


def _version() -> str:
    try:
        return version("diptych")
    except PackageNotFoundError:
        return "unknown"
