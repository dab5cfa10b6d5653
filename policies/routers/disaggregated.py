from __future__ import annotations

from collections.abc import Sequence

from policies.contract import Replica, Route
from policies.pools import PromisedBlocks, check_prefill, least_pending, num_blocks, split
from policies.registry import register
from policies.request import Request


@register("router", "disaggregated")
class Disaggregated:
    """Some replicas prefill, the others decode what those have begun: the KV moves after the first token.

    The prefill goes to the replica with the fewest prompt tokens to compute, the decode to the one with the fewest
    blocks promised or in use, both chosen on arrival; ties go to the lowest id. `prefill`: so many replicas, those with
    the lowest ids, prefill (1). Where one pool is empty, as with one replica alone, a request stays in one place.

    The plain form of what Splitwise (Patel et al., ISCA 2024), DistServe (Zhong et al., OSDI 2024) and Mooncake (Qin et
    al., FAST 2025) do in their own ways, to compare those with. O(R log R); memory: what is in flight.
    """

    moves_kv = True

    def __init__(self, prefill: int = 1, block_size: int = 16) -> None:
        check_prefill(prefill)
        self._prefill = prefill
        self._block_size = block_size
        self._promised = PromisedBlocks()

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        prefills, decodes = split(replicas, self._prefill)
        if list(prefills) == list(decodes):
            return Route(least_pending(prefills).id)
        target = min(decodes, key=lambda replica: (self._promised.at(replica), replica.id))
        self._promised.send(request, target.id, num_blocks(request.num_prompt_tokens, self._block_size))
        return Route(least_pending(prefills).id, target.id)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        self._promised.end(request)
