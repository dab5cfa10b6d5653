"""API keys, and the tenant that a key stands for."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

_SCHEME = "bearer"
MAX_TENANT = 128


class Keys:
    """The keys that are accepted: each `KEY`, or `TENANT:KEY`. Without any, everybody is let in."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._tenants: dict[bytes, str | None] = {}
        for text in keys:
            tenant, colon, key = text.partition(":")
            if not colon:
                tenant, key = "", tenant
            if not key or (colon and not tenant):
                raise ValueError("an API key is KEY or TENANT:KEY, neither part empty")
            self._tenants[key.encode()] = tenant or None

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def accepts(self, authorization: str | None) -> tuple[bool, str | None]:
        """Whether an Authorization header has one of the keys, and the tenant that it names, if any.

        Every key is compared, each in constant time.
        """
        scheme, _, given = (authorization or "").partition(" ")
        found, tenant = False, None
        for key, owner in self._tenants.items():
            if hmac.compare_digest(key, given.encode("latin-1", "replace")) and scheme.lower() == _SCHEME:
                found, tenant = True, owner
        return found, tenant
