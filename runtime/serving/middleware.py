"""What every request passes on its way in: its id, its arrival, its key and tenant, and the limit on its body."""

from __future__ import annotations

import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.serving.errors import ApiError
from runtime.serving.keys import MAX_TENANT, Keys

OPEN = frozenset({"/health", "/metrics", "/version"})
"""Paths that need no key."""
ADMIN = ("/admin/", "/flush_cache")
"""Paths that need the operator's key."""
MAX_REQUEST_ID = 256


class Edge:
    """ASGI middleware. Sets `request.state.tenant` and `.arrived`; echoes X-Request-Id, or makes one."""

    def __init__(self, app: ASGIApp, *, keys: Keys, admin_keys: Keys, max_body_bytes: int) -> None:
        self._app = app
        self._keys = keys
        self._admin_keys = admin_keys
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")[:MAX_REQUEST_ID] or uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            tenant = self._tenant(scope["path"], headers)
            self._check_length(headers)
        except ApiError as error:
            await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send_with_id)
            return
        scope.setdefault("state", {}).update(tenant=tenant, arrived=time.monotonic(), request_id=request_id)
        await self._app(scope, self._limited(receive), send_with_id)

    def _tenant(self, path: str, headers: Headers) -> str:
        """Raises ApiError for a request without a key that it needs. A key's own tenant counts, else the header's."""
        tenant = headers.get("x-tenant", "")[:MAX_TENANT]
        keys = self._admin_keys if path.startswith(ADMIN) else self._keys
        if not keys or path in OPEN:
            return tenant
        accepted, owner = keys.accepts(headers.get("authorization"))
        if not accepted:
            raise ApiError(401, "send a valid key: the header `Authorization: Bearer KEY`")
        return tenant if owner is None else owner

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._max_body_bytes:
            raise self._too_large(f"{length} bytes")

    def _limited(self, receive: Receive) -> Receive:
        """Counts a body that came without its length."""
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                error = self._too_large("more")
                raise HTTPException(error.status, error.message)
            return message

        return limited

    def _too_large(self, size: str) -> ApiError:
        return ApiError(413, f"the body has {size}; this server takes {self._max_body_bytes} bytes at most")
