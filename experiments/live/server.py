"""What a running `diptych serve --admin` tells of itself by URL. All of it is checked: it comes from outside."""

from __future__ import annotations

from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import httpx2
import msgspec
from pydantic import TypeAdapter, ValidationError

from policies.replica_state import Limits

TIMEOUT_S = 5.0
MOST_BYTES = 64 * 2**20
"""Of an answer."""


class LiveError(ValueError):
    """The server does not tell what is needed; the message is one line that says what to do."""


class ServerGone(LiveError):
    """Nothing answers there (any more)."""


class EngineState(msgspec.Struct, frozen=True):
    """One engine, as of its last step. `free_blocks`: None before the first."""

    id: int
    state: str
    running: int
    waiting: int
    num_blocks: int
    free_blocks: int | None


class Event(msgspec.Struct, frozen=True):
    """As `runtime.serving.event_log` describes arrivals and ends; what the other kind has is left out."""

    kind: Literal["arrival", "end"]
    id: int
    at_ns: int
    prompt_tokens: int = 1
    max_tokens: int = 1
    forced: bool = False
    tenant: str = ""
    session: int | None = None
    priority: int = 0
    slo: dict[str, Any] | None = None
    keys: str | None = None
    first_token_ns: int | None = None
    output_tokens: int = 0
    reason: str = ""


class Page(msgspec.Struct, frozen=True):
    """An answer of /admin/events."""

    run: str
    oldest: int
    last: int
    more: bool
    events: list[Event]
    now_ns: int
    output_tokens: int
    alive: list[tuple[int, int]]
    stack: dict[str, str]
    router: str | None
    engines: list[EngineState]


class Engine(msgspec.Struct, frozen=True):
    """Of /admin/server_info, what a twin is made from."""

    limits: dict[str, Any]
    stack: dict[str, str]
    device: str = ""
    dtype: str = ""
    model: str = ""
    cost: dict[str, Any] | None = None

    def checked_limits(self) -> Limits:
        """Raises LiveError."""
        try:
            return TypeAdapter(Limits).validate_python(self.limits)
        except ValidationError as error:
            raise LiveError(f"the server's limits cannot be used: {error.errors()[0]['msg']}") from None


class About(msgspec.Struct, frozen=True):
    """An answer of /admin/server_info."""

    model: str
    version: str
    engines: list[Engine]
    router: str | None = None


Answer = TypeVar("Answer", About, Page)


class LiveServer:
    """A server by its URL and its operator's key. Every method raises LiveError, or ServerGone."""

    def __init__(self, url: str, key: str) -> None:
        wrong = f"{url!r} is not the address of a server; give one like http://127.0.0.1:8000"
        try:
            parts = urlsplit(url.strip())
        except ValueError:
            raise LiveError(wrong) from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LiveError(wrong)
        if not key.isascii() or not key.isprintable():
            raise LiveError("the operator's key has characters that no key has")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._http = httpx2.Client(base_url=self.url, headers=headers, timeout=TIMEOUT_S, trust_env=False)
        except (httpx2.InvalidURL, ValueError):
            raise LiveError(wrong) from None

    def about(self) -> About:
        """Model, policies, limits, cost model."""
        about = self._get("/admin/server_info", {}, About)
        if not about.engines:
            raise LiveError(f"the server at {self.url} has no engine")
        return about

    def events(self, after: int, limit: int = 2000) -> Page:
        """Events with numbers above `after`, and how things stand."""
        return self._get("/admin/events", {"after": after, "limit": limit}, Page)

    def close(self) -> None:
        self._http.close()

    def _get(self, path: str, query: dict[str, int], kind: type[Answer]) -> Answer:
        try:
            with self._http.stream("GET", path, params=query) as response:
                if response.status_code == 401:
                    raise LiveError(f"the server at {self.url} does not take this key; give its --admin-key")
                if response.status_code == 404:
                    raise LiveError(f"there is no {path} at {self.url}; start the server with: diptych serve --admin")
                if response.status_code != 200:
                    raise LiveError(f"{self.url}{path} answers with status {response.status_code}")
                body = bytearray()
                for part in response.iter_bytes():
                    body += part
                    if len(body) > MOST_BYTES:
                        raise LiveError(f"the answer of {self.url}{path} has no end")
        except httpx2.HTTPError as error:
            raise ServerGone(f"nothing answers at {self.url}: {_why(error)}") from None
        except httpx2.InvalidURL as error:
            raise LiveError(f"{self.url} is not the address of a server: {error}") from None
        try:
            return msgspec.json.decode(bytes(body), type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise LiveError(f"what answers at {self.url} is no Diptych server: {error}") from None


def _why(error: Exception) -> str:
    if isinstance(error, httpx2.TimeoutException):
        return f"no answer within {TIMEOUT_S:g} s"
    return " ".join(str(error).split()) or type(error).__name__
