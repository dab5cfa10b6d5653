"""The HTTP application: the endpoints of one service behind its edge."""

from __future__ import annotations

from fastapi import FastAPI

from runtime.serving import admin, chat, completions, errors, info, native, tokenization
from runtime.serving.keys import Keys
from runtime.serving.middleware import Edge
from runtime.serving.service import Service


def build_app(service: Service, *, keys: Keys, admin_keys: Keys) -> FastAPI:
    """The application. Without admin keys there are no operator's endpoints."""
    app = FastAPI(title="Diptych", description="An OpenAI-compatible server whose policies are changed by a flag.")
    errors.install(app)
    rooms = [completions, chat, native, tokenization, info, *([admin] if admin_keys else [])]
    for room in rooms:
        app.include_router(room.router(service))
    app.add_middleware(Edge, keys=keys, admin_keys=admin_keys, max_body_bytes=service.limits.max_body_bytes)
    return app
