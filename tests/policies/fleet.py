"""Replicas as a router sees them, without a panel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from policies.request import Request


@dataclass
class Loaded:
    """A replica with set figures. `cached`: the block keys that it has."""

    id: int
    num_outstanding_tokens: int = 0
    num_waiting: int = 0
    num_running: int = 0
    num_free_blocks: int = 100
    num_blocks: int = 100
    num_prefill_tokens: int = 0
    cached: set[bytes] = field(default_factory=set)

    def match(self, keys: Sequence[bytes]) -> int:
        return next((i for i, key in enumerate(keys) if key not in self.cached), len(keys))


def chain(name: str, num_blocks: int) -> list[bytes]:
    """Keys of a prompt; those of `chain("a", 3)` are the first three of `chain("a", 5)`."""
    return [f"{name}{i}".encode() for i in range(num_blocks)]


def prompt(id: int, num_blocks: int = 1, block_size: int = 16, **more: object) -> Request:
    """A request of so many full blocks, which comes at the time of its id."""
    return Request(id, id, num_blocks * block_size, 16, **more)  # type: ignore[arg-type]
