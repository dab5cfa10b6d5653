"""What came to the server and what became of it, for whoever watches from outside: a ring of the newest events.

An arrival and an end are one append each. Prompts are not kept: the names of their full blocks are, and only while
somebody watches, as they take longer than all the rest (0.2 ms for 2,048 tokens).
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from policies.prefix import block_keys
from runtime.sampling.params import SamplingParams
from runtime.serving.engine_client import Prompt

KEEP = 16_384
"""Events, at most; two a request."""
KEEP_KEY_BYTES = 32 * 2**20
"""Of block names, in all of them."""
PAGE_KEY_BYTES = 2 * 2**20
"""Of block names, in one answer; the event that goes beyond is still in it."""
WATCHED_S = 30.0
"""How long after somebody asked the names of blocks are still made."""


@dataclass(slots=True)
class Arrival:
    """A request that was handed to the engines. `forced`: it ends after `max_tokens` tokens and no sooner."""

    id: int
    at_ns: int
    prompt_tokens: int
    max_tokens: int
    forced: bool
    tenant: str
    session: int | None
    priority: int
    slo: dict[str, Any] | None
    keys: bytes | None

    def describe(self) -> dict[str, Any]:
        return {"kind": "arrival", **asdict(self), "keys": None if self.keys is None else self.keys.hex()}


@dataclass(slots=True)
class End:
    """A request that has ended: `stop`, `length`, `abort` (its client went away) or `error`."""

    id: int
    at_ns: int
    first_token_ns: int | None
    output_tokens: int
    reason: str
    keys: None = field(default=None, repr=False)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "end",
            "id": self.id,
            "at_ns": self.at_ns,
            "first_token_ns": self.first_token_ns,
            "output_tokens": self.output_tokens,
            "reason": self.reason,
        }


class EventLog:
    """The newest events, numbered from 0. Times are nanoseconds since the log began, on one clock.

    Args:
        block_size: tokens of a block, whose names are kept; None where prefixes are not cached.
        longest: tokens of prompt and output of a request without a cap.
    """

    def __init__(self, block_size: int | None, longest: int, keep: int = KEEP) -> None:
        self.run = secrets.token_hex(8)
        """Another one after every start of the server: numbers and times begin anew."""
        self.started = time.monotonic()
        self._block_size = block_size
        self._longest = longest
        self._events: deque[Arrival | End] = deque()
        self._keep = keep
        self._first = 0  # number of the oldest
        self._key_bytes = 0
        self._watched_until = 0.0

    def ns(self, at: float) -> int:
        """A time of `time.monotonic` on the log's clock."""
        return round((at - self.started) * 1e9)

    def now_ns(self) -> int:
        return self.ns(time.monotonic())

    def arrived(self, request_ids: Sequence[int], prompts: Sequence[Prompt]) -> None:
        """Requests have just been handed in, each prompt's continuations one after another."""
        now, ids = time.monotonic(), iter(request_ids)
        for prompt in prompts:
            keys = None
            if self._block_size is None:
                keys = b""
            elif now < self._watched_until:
                keys = b"".join(block_keys(prompt.token_ids, self._block_size))
            cap = self._longest - len(prompt.token_ids)
            if prompt.params.max_tokens is not None:
                cap = min(cap, prompt.params.max_tokens)
            details, forced = prompt.details, _forced(prompt.params)
            slo = None if details.slo is None else asdict(details.slo)
            for _ in range(prompt.params.n):
                self._add(
                    Arrival(
                        next(ids),
                        self.ns(now),
                        len(prompt.token_ids),
                        cap,
                        forced,
                        details.tenant,
                        details.session,
                        details.priority,
                        slo,
                        keys,
                    )
                )

    def ended(self, request_id: int, at: float, first_token: float | None, num_tokens: int, reason: str) -> None:
        """A request is over; `at` 0: just now."""
        first = None if first_token is None else self.ns(first_token)
        self._add(End(request_id, self.ns(at or time.monotonic()), first, num_tokens, reason))

    def page(self, after: int, limit: int) -> dict[str, Any]:
        """The first `limit` events with numbers above `after`: `events`, the number of the `oldest` that is kept, the
        `last` one here (ask for what comes after it), and whether there is `more`."""
        self._watched_until = time.monotonic() + WATCHED_S
        begin = max(after + 1, self._first)
        events: list[dict[str, Any]] = []
        size = 0
        for event in islice(self._events, begin - self._first, None):
            if len(events) >= limit or size > PAGE_KEY_BYTES:
                break
            events.append(event.describe())
            size += len(event.keys or b"")
        last = begin + len(events) - 1
        newest = self._first + len(self._events) - 1
        return {"run": self.run, "oldest": self._first, "last": last, "more": last < newest, "events": events}

    def _add(self, event: Arrival | End) -> None:
        self._events.append(event)
        self._key_bytes += len(event.keys or b"")
        while len(self._events) > self._keep or self._key_bytes > KEEP_KEY_BYTES:
            self._key_bytes -= len(self._events.popleft().keys or b"")
            self._first += 1


def _forced(params: SamplingParams) -> bool:
    return params.max_tokens is not None and params.ignore_eos and not params.stop and not params.stop_token_ids
