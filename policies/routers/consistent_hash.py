from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from hashlib import blake2b

from policies.contract import Replica, Route
from policies.registry import register
from policies.request import Request
from policies.routing import InFlight

KEYS = ("auto", "session", "tenant", "prefix")


@register("router", "consistent_hash")
class ConsistentHash:
    """A ring of hashed replicas: each session, tenant or prefix has its place, and none takes far more than its share.

    Every replica has `virtual_nodes` points on a ring of 2**64; a key belongs to the first point clockwise from its
    own. A replica that joins takes K / (R + 1) of K keys in expectation, each from its old owner to the new one, and
    nobody else moves (Karger et al., STOC 1997). Bounded loads: a replica takes no request beyond
    ceil((1 + epsilon) * m / R), where m counts all requests in flight, this one included; the next one clockwise does
    (Mirrokni, Thorup, Zadimoghaddam, SODA 2018; known as CHWBL). Somebody always has room, also with epsilon = 0.

    `epsilon`: 0.25; `none` for no bound. `key`: what is hashed;
    `auto` is the session, else the tenant, else the prompt's first block; a request that has nothing of that kind is
    hashed by its own id. `virtual_nodes`: 100; the owners' shares differ by about 1 / sqrt(virtual_nodes).

    The paper also moves requests that are placed already, to keep the bound when some end or a replica leaves; here
    one that runs stays, as its KV cache is there. Loads are the larger of the router's own count and the reported one.
    Where nobody is near the bound a route is O(R) for the loads, and O(log ring) for the place; steps over full
    replicas are O(1 / epsilon**2) in expectation. The ring is sorted anew when a replica joins or leaves.
    """

    def __init__(self, virtual_nodes: int = 100, epsilon: float | None = 0.25, key: str = "auto") -> None:
        if virtual_nodes < 1:
            raise ValueError(f"virtual_nodes must be at least 1, not {virtual_nodes}")
        if epsilon is not None and epsilon < 0:
            raise ValueError(f"epsilon must be at least 0, or none, not {epsilon}")
        if key not in KEYS:
            raise ValueError(f"key must be one of {', '.join(KEYS)}, not {key}")
        self._virtual_nodes = virtual_nodes
        self._epsilon = epsilon
        self._key = key
        self._members: list[int] = []
        self._points: list[int] = []
        self._owners: list[int] = []
        self._in_flight = InFlight()

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        members = [replica.id for replica in replicas]
        if members != self._members:
            self._build(members)
        start = bisect_left(self._points, _place(self._name(request, keys)))
        chosen = self._owners[start % len(self._owners)]
        if self._epsilon is not None:
            loads = {replica.id: self._in_flight.load(replica) for replica in replicas}
            bound = (1 + self._epsilon) * (sum(loads.values()) + 1) / len(replicas)
            step = 0
            while loads[chosen] >= bound:  # in whole numbers: loads + 1 > ceil(bound)
                step += 1
                chosen = self._owners[(start + step) % len(self._owners)]
        self._in_flight.sent(request, chosen)
        return Route(chosen)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        self._in_flight.ended(request)

    def _build(self, members: list[int]) -> None:
        ring = sorted((_place(f"replica {i}/{v}".encode()), i) for i in members for v in range(self._virtual_nodes))
        self._members = members
        self._points = [point for point, _ in ring]
        self._owners = [owner for _, owner in ring]

    def _name(self, request: Request, keys: Sequence[bytes]) -> bytes:
        if self._key in ("auto", "session") and request.session is not None:
            return f"session {request.session}".encode()
        if self._key in ("auto", "tenant") and request.tenant:
            return f"tenant {request.tenant}".encode("utf-8", "surrogatepass")
        if self._key in ("auto", "prefix") and keys:
            return b"prefix " + keys[0]
        return f"request {request.id}".encode()


def _place(name: bytes) -> int:
    return int.from_bytes(blake2b(name, digest_size=8, person=b"diptych-ring").digest(), "big")
