"""Replicas in two pools, one for prefills and one for decodes, as disaggregating routers see them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from policies.contract import Replica
from policies.request import Request

AnyReplica = TypeVar("AnyReplica", bound=Replica)


def split(replicas: Sequence[AnyReplica], prefill: int) -> tuple[list[AnyReplica], list[AnyReplica]]:
    """The prefill pool and the decode pool, both by id. Where replicas have roles those count, and one for both is in
    both; else replicas 0 to `prefill` - 1 prefill. A replica that is gone leaves its pool smaller; where one is empty,
    the other one is both."""
    ordered = sorted(replicas, key=lambda replica: replica.id)
    if any(replica.role != "both" for replica in ordered):
        first = [replica for replica in ordered if replica.role != "decode"]
        second = [replica for replica in ordered if replica.role != "prefill"]
    else:
        first = [replica for replica in ordered if replica.id < prefill]
        second = [replica for replica in ordered if replica.id >= prefill]
    return first or second, second or first


def check_prefill(prefill: int) -> None:
    """Raise ValueError for what is no size of a prefill pool."""
    if prefill < 1:
        raise ValueError(f"prefill must be at least 1, not {prefill}: so many replicas prefill, the others decode")


def least_pending(replicas: Iterable[AnyReplica]) -> AnyReplica:
    """The replica with the fewest prompt tokens to compute, of equal ones the lowest."""
    return min(replicas, key=lambda replica: (replica.num_prefill_tokens, replica.id))


class PromisedBlocks:
    """KV blocks that a router has promised replicas to bring there, by replica, until the requests' ends.

    Memory: what is in flight.
    """

    def __init__(self) -> None:
        self._sent: dict[int, tuple[int, int]] = {}  # request id -> replica, blocks
        self._blocks: dict[int, int] = {}
        self._counts: dict[int, int] = {}

    def send(self, request: Request, replica: int, blocks: int) -> None:
        self.end(request)
        self._sent[request.id] = (replica, blocks)
        self._blocks[replica] = self._blocks.get(replica, 0) + blocks
        self._counts[replica] = self._counts.get(replica, 0) + 1

    def end(self, request: Request) -> None:
        if request.id in self._sent:
            replica, blocks = self._sent.pop(request.id)
            self._blocks[replica] -= blocks
            self._counts[replica] -= 1
            if not self._counts[replica]:
                del self._blocks[replica], self._counts[replica]

    def count(self, replica: int) -> int:
        """How many requests have blocks promised at a replica."""
        return self._counts.get(replica, 0)

    def at(self, replica: Replica) -> int:
        """Blocks promised to a replica, or in use there, whichever is more."""
        return max(self._blocks.get(replica.id, 0), replica.num_blocks - replica.num_free_blocks)
