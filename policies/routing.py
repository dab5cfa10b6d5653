"""What a router knows by itself: what it has sent where, and which prompts' blocks that brought there."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence

from policies.contract import Replica
from policies.request import Request

LOADS = ("both", "reported", "own")
"""Which count of a replica's requests a router goes by: what the replica reports, what the router has sent there and
not yet seen end, or the larger of the two."""


class InFlight:
    """The requests that a router has sent and not yet seen end, by replica.

    A replica's figures may be old (`stale`), but know of everybody. The router's own count is never old, but does not
    know of what a router before it, or another one, has sent. Each is a lower bound of what there is or was, so by
    default the larger one counts. An end of a request that was never sent changes nothing. Memory: what is in flight.
    """

    def __init__(self, load: str = "both") -> None:
        if load not in LOADS:
            raise ValueError(f"load must be one of {', '.join(LOADS)}, not {load}")
        self._which = load
        self._replica_of: dict[int, int] = {}
        self._counts: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._replica_of)

    def sent(self, request: Request, replica: int) -> None:
        self.ended(request)
        self._replica_of[request.id] = replica
        self._counts[replica] = self._counts.get(replica, 0) + 1

    def ended(self, request: Request) -> None:
        replica = self._replica_of.pop(request.id, None)
        if replica is not None:
            left = self._counts.pop(replica) - 1
            if left:
                self._counts[replica] = left

    def load(self, replica: Replica) -> int:
        """Requests at a replica, waiting and running."""
        own = self._counts.get(replica.id, 0)
        if self._which == "own":
            return own
        reported = replica.num_waiting + replica.num_running
        return reported if self._which == "reported" or reported > own else own

    def least_loaded(self, replicas: Iterable[Replica]) -> int:
        """The id of the replica with the fewest requests; of equal ones the lowest."""
        return min((self.load(replica), replica.id) for replica in replicas)[1]


def num_uncached_tokens(request: Request, num_cached_blocks: int, block_size: int) -> int:
    """Prompt tokens that a replica with so many leading blocks has to compute: at least the last one."""
    return request.num_prompt_tokens - block_size * min(
        num_cached_blocks, (request.num_prompt_tokens - 1) // block_size
    )


def num_leading(keys: Sequence[bytes], known: Collection[bytes]) -> int:
    """How many leading keys are known, where no key is known without all before it. O(log keys)."""
    if not keys or keys[0] not in known:  # so it is at most replicas
        return 0
    return bisect_left(keys, True, key=lambda key: key not in known)


class RoutedPrefixes:
    """Which prompts' blocks went to which replica: a router's own guess at what the prefix caches hold.

    A radix tree over prompts comes down to a table here, since a block's key stands for all that come before it. Each
    replica's most recently sent blocks are kept, and a block never without all those before it: a prompt's
    first block counts as used after its last one. Memory: `max_blocks` keys a replica.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, OrderedDict[bytes, None]] = {}  # by replica; the least recently used first
        self._holders: dict[bytes, dict[int, None]] = {}

    def __len__(self) -> int:
        return sum(len(blocks) for blocks in self._blocks.values())

    def size(self, replica: int) -> int:
        """Blocks that a replica has by this guess."""
        return len(self._blocks.get(replica, ()))

    def match(self, keys: Sequence[bytes], replica: int) -> int:
        """Leading blocks that a replica has. O(log keys)."""
        return num_leading(keys, self._blocks.get(replica, ()))

    def best_match(self, keys: Sequence[bytes]) -> tuple[int, list[int]]:
        """The most leading blocks that any replica has, and the replicas that have so many. O(log keys + answer)."""
        most = num_leading(keys, self._holders)
        return most, list(self._holders[keys[most - 1]]) if most else []

    def sent(self, keys: Sequence[bytes], replica: int, max_blocks: int) -> None:
        """A prompt with these blocks goes to a replica, which holds `max_blocks`. O(keys)."""
        blocks = self._blocks.setdefault(replica, OrderedDict())
        for key in reversed(keys[:max_blocks]):
            if key in blocks:
                blocks.move_to_end(key)
            else:
                blocks[key] = None
                self._holders.setdefault(key, {})[replica] = None
        while len(blocks) > max_blocks:
            self._drop(blocks.popitem(last=False)[0], replica)

    def keep_only(self, replicas: Collection[int]) -> None:
        """Forget every other replica: it is gone, or a fresh one may come in its place."""
        for replica in [replica for replica in self._blocks if replica not in replicas]:
            for key in self._blocks.pop(replica):
                self._drop(key, replica)

    def _drop(self, key: bytes, replica: int) -> None:
        holders = self._holders[key]
        del holders[replica]
        if not holders:
            del self._holders[key]
