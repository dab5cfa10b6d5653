"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)

MAX_MESSAGE = 500
_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one line that says what to do.
        param: the field that is at fault.
        retry_after: seconds after which trying again may help.
    """

    def __init__(self, status: int, message: str, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status, "BadRequestError" if self.status < 500 else "InternalServerError")
        return {
            "error": {"message": self.message[:MAX_MESSAGE], "type": kind, "param": self.param, "code": self.status}
        }


def bad_request(error: ValueError, param: str | None = None) -> ApiError:
    """A value that our own checks refuse; their messages begin with the field's name."""
    text = str(error)
    first = text.split(" ", 1)[0].rstrip(":")
    return ApiError(400, text, param or (first if first.isidentifier() and "_" in first else None))


def install(app: FastAPI) -> None:
    """Have every error of an application answered in this form."""

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
        answer = ApiError(error.status_code, str(error.detail))
        return JSONResponse(answer.body(), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(_first(error).body(), 400)

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        answer = ApiError(500, f"the server failed on this request: {type(error).__name__}")
        return JSONResponse(answer.body(), 500)


def _first(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, with the field's name."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{field} is not supported here; leave it out", field)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', message)}")
    if not field:
        return ApiError(400, f"the body must be a JSON object, sent as application/json ({message})")
    return ApiError(400, f"{field}: {message}", field.split(".", 1)[0])
