from __future__ import annotations

from collections.abc import Sequence

from policies.block_pool import num_blocks
from policies.contract import LATER, ClusterReplica, Replica, Route
from policies.pools import check_prefill, split
from policies.registry import register
from policies.request import Request


@register("router", "distserve")
class DistServe:
    """DistServe: prefills join the shortest queue, and decode replicas pull finished ones when they have room.

    Zhong et al., "DistServe: Disaggregating Prefill and Decoding for Goodput-optimized Large Language Model Serving",
    OSDI 2024, section 4.3. A request goes to the prefill replica with the fewest requests that wait or prefill (then
    the fewest prompt tokens to compute, then the lowest id). Its finished KV stays there, first come, first served,
    until a decode replica accepts it: the memory of the prefill replicas is the queue for decoding, and when that is
    full they prefill no more. As in the authors' code (`should_accept` of the decoding stage) a replica accepts while

        blocks that are on their way there, or have come and wait for a slot, < waiting * all its blocks
        blocks of the request's tokens <= its free blocks

    Of those that accept, the one with the fewest blocks in use, promised ones included, takes it (then the lowest id).

    `prefill`: so many replicas, those with the lowest ids, prefill (1). `waiting`: as above, a share of the replica's
    blocks (0.05, the code's `waiting_block_prop_threshold`). Where one pool is empty, all is done by the other one.

    The code has one prefill and one decode instance, and the paper says "least loaded" of decode instances without
    saying of what: here it is memory, as that is what a pull needs. Blocks are those of prompt and first token (the
    code: of the prompt). Blocks that the target has cached and in use are not taken off. The search for pool sizes and
    parallelism (section 4.1) is not a router's; `diptych capacity` with other values of `prefill` is its inner step.

    A route is O(R log R), and so is a pull. Keeps nothing.
    """

    moves_kv = True

    def __init__(self, prefill: int = 1, waiting: float = 0.05, block_size: int = 16) -> None:
        check_prefill(prefill)
        if not 0 < waiting <= 1:
            raise ValueError(f"waiting must be above 0 and at most 1, not {waiting}: a share of a replica's blocks")
        self._prefill = prefill
        self._waiting = waiting
        self._block_size = block_size

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        prefills, decodes = split(replicas, self._prefill)
        first = min(prefills, key=lambda r: (r.num_waiting + r.num_running, r.num_prefill_tokens, r.id))
        return Route(first.id) if prefills == decodes else Route(first.id, LATER)

    def pull(self, request: Request, replicas: Sequence[ClusterReplica], now: int) -> int | None:
        _, decodes = split(replicas, self._prefill)
        blocks = num_blocks(request.num_tokens, self._block_size)
        takers = [replica for replica in decodes if self._accepts(replica, blocks)]
        return min(takers, key=lambda r: (r.num_blocks - r.num_free_blocks, r.id)).id if takers else None

    def _accepts(self, replica: ClusterReplica, blocks: int) -> bool:
        return replica.num_incoming_blocks < self._waiting * replica.num_blocks and blocks <= replica.num_free_blocks

    def on_end(self, request: Request, replica: int, now: int) -> None: ...
