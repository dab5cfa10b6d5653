"""Replicas as a router sees them, without a panel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from policies import registry
from policies.contract import Router
from policies.request import Request
from policies.shapes import StepShape

SECOND = 1_000_000_000


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
    num_incoming_blocks: int = 0
    pool: str = ""
    role: str = "both"
    cost: Any = None
    max_num_seqs: int = 256

    def match(self, keys: Sequence[bytes]) -> int:
        return next((i for i, key in enumerate(keys) if key not in self.cached), len(keys))

    def decoding(self) -> Iterator[Request]:
        return iter(())


@dataclass(frozen=True)
class PerToken:
    """Nanoseconds a token of a step, and for each token of context of its decodes."""

    ns: int = 1_000
    context_ns: int = 0

    def step_ns(self, shape: StepShape) -> int:
        return self.ns * (shape.chunk_tokens + shape.num_decodes) + self.context_ns * shape.decode_context


@dataclass(frozen=True)
class PerBlock:
    """Nanoseconds a KV block on its way."""

    ns: int = 100

    def transfer_ns(self, num_blocks: int) -> int:
        return self.ns * num_blocks


def make_router(text: str, **context: object) -> Any:
    """A router by its text, in surroundings that give all that a simulation gives."""
    given: dict[str, object] = {"seed": 7, "block_size": 16, "cost": PerToken(), "transfer": PerBlock()}
    return registry.make("router", text, **(given | context))


def chain(name: str, num_blocks: int) -> list[bytes]:
    """Keys of a prompt; those of `chain("a", 3)` are the first three of `chain("a", 5)`."""
    return [f"{name}{i}".encode() for i in range(num_blocks)]


def prompt(id: int, num_blocks: int = 1, block_size: int = 16, **more: object) -> Request:
    """A request of so many full blocks, which comes at the time of its id."""
    return Request(id, id, num_blocks * block_size, 16, **more)  # type: ignore[arg-type]


def make(text: str, seed: int = 0) -> Router:
    """As `make_router`, with a seed of one's own."""
    return make_router(text, seed=seed)


def send(router: Router, request: Request, fleet: Sequence[Loaded], keys: Sequence[bytes] = (), now: int = 0) -> int:
    """Where it goes; the replica has it from then on."""
    route = router.route(request, keys, fleet, now)
    assert route is not None
    replica = next(replica for replica in fleet if replica.id == route.replica)
    replica.num_running += 1
    return replica.id


def fleet_of(loads: Sequence[int], **more: object) -> list[Loaded]:
    return [Loaded(i, num_running=load, **more) for i, load in enumerate(loads)]  # type: ignore[arg-type]
