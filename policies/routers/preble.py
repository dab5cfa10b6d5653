from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import islice

from policies.contract import Replica, Route
from policies.registry import register
from policies.request import Request
from policies.routing import num_leading, num_uncached_tokens


@register("router", "preble")
class Preble:
    """Exploit a cached prefix where it is at least half of the prompt, else explore for the least loaded replica (E2).

    Srivatsa et al., "Preble: Efficient Distributed Prompt Scheduling for LLM Serving", ICLR 2025, section 3.2:

        cached >= missed tokens, at the replicas with the longest match: the one of these with the smallest L
        else: the smallest L + M + P over all replicas

    L: work sent to a replica in the last `window_s` (180, the paper's three minutes): tokens missed, and `decode_cost`
    for each output token. M: what has to be evicted for this request, block by block, times the share of the replica's
    requests in the window that use the block. P: the tokens missed by this request. Rebalancing: where the choice to
    exploit falls on the replica with the largest L, and that is above `balance` (1.5) times the smallest, the request
    goes to the one with the smallest, which has the prefix from then on. Ties go to the lowest id.

    All in prompt tokens: the paper turns tokens into seconds by a regression for each GPU, but a router here has no
    cost model. `decode_cost` (4): prompt tokens that one output token costs in a full batch. The paper takes the
    window's mean output; a router here learns no output lengths in the real panel, so the client's declared one counts
    (hint `output_tokens`, else the cap). What is cached is the router's own model: the last `num_blocks` blocks sent.
    Left out: splitting a hot prefix over replicas by its queueing delay, and the local scheduler's queue (section 3.3).

    O(R log blocks) for the choice, O(blocks of the prompt) to note it; M is O(1) while blocks are there that nobody in
    the window has used, else O(blocks to evict). Memory: the requests of the window, and `num_blocks` keys a replica.
    A replica that takes no requests is forgotten.
    """

    def __init__(
        self, window_s: float = 180.0, balance: float = 1.5, decode_cost: float = 4.0, block_size: int = 16
    ) -> None:
        if window_s <= 0 or balance < 1 or decode_cost < 0:
            raise ValueError(
                "window_s must be above 0, balance at least 1 and decode_cost at least 0, "
                f"not {window_s}, {balance} and {decode_cost}"
            )
        self._window_ns = round(window_s * 1e9)
        self._balance = balance
        self._decode_cost = decode_cost
        self._block_size = block_size
        self._sent: dict[int, SentTo] = {}

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        self._sent = {replica.id: self._sent.get(replica.id) or SentTo() for replica in replicas}
        for sent in self._sent.values():
            sent.forget_before(now - self._window_ns)
        matches = {i: sent.match(keys) for i, sent in self._sent.items()}
        chosen = self._choose(request, matches, {replica.id: replica.num_blocks for replica in replicas})
        missed = num_uncached_tokens(request, matches[chosen], self._block_size)
        work = missed + self._decode_cost * self._output(request)
        blocks = next(replica.num_blocks for replica in replicas if replica.id == chosen)
        self._sent[chosen].note(keys, work, now, blocks)
        return Route(chosen)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        """The work of the window counts, done or not."""

    def _choose(self, request: Request, matches: dict[int, int], num_blocks: dict[int, int]) -> int:
        loads = {i: sent.load for i, sent in self._sent.items()}
        lightest = min(loads, key=lambda i: (loads[i], i))
        longest = max(matches.values())
        missed = num_uncached_tokens(request, longest, self._block_size)
        if request.num_prompt_tokens - missed >= missed:
            chosen = min((i for i in loads if matches[i] == longest), key=lambda i: (loads[i], i))
            heaviest = loads[chosen] == max(loads.values())
            return lightest if heaviest and loads[chosen] > self._balance * loads[lightest] else chosen
        return min(loads, key=lambda i: (loads[i] + self._own_cost(request, i, matches[i], num_blocks[i]), i))

    def _own_cost(self, request: Request, replica: int, match: int, num_blocks: int) -> float:
        """M + P."""
        tokens = request.num_prompt_tokens + self._output(request)
        needed = -(-round(tokens) // self._block_size) - match
        evicted = self._block_size * self._sent[replica].eviction_cost(needed, num_blocks)
        return evicted + num_uncached_tokens(request, match, self._block_size)

    def _output(self, request: Request) -> float:
        return request.hints.get("output_tokens", request.max_tokens)


class SentTo:
    """What went to one replica: the work of the window, and the blocks that should be cached there.

    Blocks that requests of the window use are warm, with the number of these requests, the others cold; in both the
    least recently used comes first, and a prompt's end before its beginning, so that none is evicted before those
    behind it.
    """

    def __init__(self) -> None:
        self.load = 0.0
        self._num_noted = 0
        self._recent: deque[tuple[int, int, float, Sequence[bytes]]] = deque()  # time, its number, work, blocks
        self._warm: OrderedDict[bytes, tuple[int, int]] = OrderedDict()  # users, number of the first of them
        self._cold: OrderedDict[bytes, None] = OrderedDict()

    def match(self, keys: Sequence[bytes]) -> int:
        """Leading blocks that are there. O(log keys), as none is there without all before it."""
        warm = num_leading(keys, self._warm)
        return warm + num_leading(keys[warm:], self._cold)

    def note(self, keys: Sequence[bytes], work: float, now: int, num_blocks: int) -> None:
        self._num_noted += 1
        self._recent.append((now, self._num_noted, work, keys))
        self.load += work
        for key in reversed(keys):
            self._cold.pop(key, None)
            users, first = self._warm.pop(key, (0, self._num_noted))
            self._warm[key] = (users + 1, first)
        while len(self._warm) + len(self._cold) > num_blocks:
            (self._cold or self._warm).popitem(last=False)

    def forget_before(self, time: int) -> None:
        """What was sent then or earlier is out of the window."""
        while self._recent and self._recent[0][0] <= time:
            _, number, work, keys = self._recent.popleft()
            self.load = self.load - work if self._recent else 0.0  # no rounding errors pile up
            for key in reversed(keys):
                users, first = self._warm.get(key, (0, 0))
                if number < first:
                    continue  # evicted meanwhile, and sent again
                if users > 1:
                    self._warm[key] = (users - 1, first)
                elif users:
                    del self._warm[key]
                    self._cold[key] = None

    def eviction_cost(self, needed: int, num_blocks: int) -> float:
        """Blocks that must go for so many new ones, each counted as the share of the window's requests that use it."""
        free = num_blocks - len(self._warm) - len(self._cold)
        warm = needed - free - len(self._cold)
        if warm <= 0 or not self._recent:
            return 0.0
        return sum(users for users, _ in islice(self._warm.values(), warm)) / len(self._recent)
