from __future__ import annotations

import heapq

from policies.contract import View
from policies.draft import Draft
from policies.key_queue import KeyQueue
from policies.prefix import hit_tokens
from policies.registry import register
from policies.request import Request
from policies.tenant_queue import SCALE, TenantQueue


@register("queue", "dlpm")
class Dlpm(TenantQueue):
    """Deficit longest prefix match: of the tenants that have not spent their quantum, the request with the longest hit.

    Each tenant has a deficit q, at first 0. Next is the waiting request with the longest cached prefix among those of
    tenants with q > 0. If no tenant who waits has q > 0, everybody with q <= 0 gets q += quantum, until one has. An
    admission costs q -= w_e * (prompt tokens that the cache does not have) / weight, each output token q -= w_q /
    weight. Between refills the order is free to follow the cache, which a queue by counters is not; a larger quantum is
    more local and less fair. A tenant that comes new waits for the next refill.

    `quantum`: tokens; 0 is a twentieth of the KV cache. `input_weight` (w_e), `output_weight` (w_q), `weights`: as
    `a:2;b:1`, see `TenantQueue`. `window`: how many waiting requests are looked up in the cache in one step.
    Where this departs: the paper sorts the whole queue by its matches in every step. Here at most `window` requests of
    tenants with q > 0 are looked up, once in a step with a free slot and again after a refill: the first ones of each
    tenant, as many of each; of more tenants than that, one of each of those that have had somebody waiting for longest.
    Among requests without a hit, and beyond the window, the earliest of the tenants with q > 0 goes first. A preempted
    request is not charged for what it computes again. D2LPM, which splits quanta by worker, is a router's, not here.
    With no prefix in common, a quantum that nobody spends, and every tenant there at the first refill, this is first
    come, first served.
    Cost: O(window * blocks of a prompt) a step with a free slot, O(window + log tenants) an admission, O(tenants) a
    refill.
    Source: Cao et al., "Locality-aware Fair Scheduling in LLM Serving", 2025, arXiv 2501.14312, algorithm 1.
    """

    def __init__(
        self,
        quantum: int = 0,
        input_weight: float = 1.0,
        output_weight: float = 2.0,
        weights: str = "",
        window: int = 64,
    ) -> None:
        super().__init__(input_weight, output_weight, weights)
        if quantum < 0 or window < 1:
            raise ValueError("quantum must be 0 (a twentieth of the KV cache) or more, and window at least 1")
        self._given = quantum
        self._quantum = max(1, quantum) * SCALE
        self._window = window
        self.deficits: dict[str, int] = {}  # in millionths of a token
        self._heads: list[
            tuple[int, int, str]
        ] = []  # (*key of the head, tenant) of those who may go, among old entries
        self._view: View | None = None  # to look requests up in; None: not in this step, or done
        self._looked_in: View | None = None
        self._hits: dict[int, int] = {}  # tokens, of those looked up
        self._by_hit: list[Request] = []  # those with a hit, the longest first
        self._choice: Request | None = None  # until something changes

    def begin(self, draft: Draft, now: int) -> None:
        super().begin(draft, now)
        if not self._given:
            self._quantum = max(1, draft.view.num_blocks * draft.view.block_size // 20) * SCALE
        self._hits, self._by_hit, self._choice = {}, [], None
        self._view = draft.view if draft.seqs_left > 0 else None
        self._looked_in = None

    def choose(self, now: int) -> Request | None:
        if self._choice is None and self._waiting:
            while (first := self._first_open()) is None:
                self._refill()
            if self._view is not None:
                self._look_up(self._view)
            hits = (request for request in self._by_hit if self.deficits[request.tenant] > 0)
            self._choice = next(hits, first)
        return self._choice

    def _first_open(self) -> Request | None:
        """The earliest head of a tenant with something to spend."""
        while self._heads:
            *key, tenant = self._heads[0]
            head = self.head(tenant)
            if head is not None and head.key == tuple(key) and self.deficits[tenant] > 0:
                return head
            heapq.heappop(self._heads)
        return None

    def _look_up(self, view: View) -> None:
        able = [tenant for tenant in self._waiting if self.deficits[tenant] > 0]
        share = max(1, self._window // len(able))
        for tenant in able[: self._window]:
            for request in first_of(self._waiting[tenant], share):
                hit = hit_tokens(request, view)
                if hit and request.id not in self._hits:
                    self._hits[request.id] = hit
                    self._by_hit.append(request)
        self._by_hit.sort(key=lambda request: (-self._hits[request.id], request.key))
        self._looked_in, self._view = self._view, None

    def _refill(self) -> None:
        """As many quanta to all in debt as make one of those who wait eligible; to nobody who is."""
        rounds = min(-self.deficits[tenant] // self._quantum + 1 for tenant in self._waiting)
        for tenant, deficit in self.deficits.items():
            if deficit <= 0:
                self.deficits[tenant] = deficit + min(rounds, -deficit // self._quantum + 1) * self._quantum
                self.has_head(tenant)
        self._view = self._view or self._looked_in

    def will_queue(self, tenant: str, now: int, *, back: bool) -> None:
        self.deficits.setdefault(tenant, 0)

    def has_head(self, tenant: str) -> None:
        self._choice = None
        head = self.head(tenant)
        if head is not None and self.deficits[tenant] > 0:
            heapq.heappush(self._heads, (*head.key, tenant))
        if len(self._heads) > 2 * len(self._waiting) + 64:
            heads = [(one, self.head(one)) for one in self._waiting if self.deficits[one] > 0]
            self._heads = [(*head.key, one) for one, head in heads if head is not None]
            heapq.heapify(self._heads)

    def _take(self, request: Request) -> None:
        if self._hits.get(request.id):
            self._by_hit.remove(request)
        super()._take(request)
        self.has_head(request.tenant)
        self._hits.pop(request.id, None)

    def charge(self, tenant: str, amount: int) -> None:
        self.deficits[tenant] = self.deficits.get(tenant, 0) - amount
        self._choice = None
        if amount < 0:
            self.has_head(tenant)

    def num_input(self, request: Request, *, ran: bool) -> int:
        return request.num_prompt_tokens - (request.num_cached_tokens if ran else self._hits.get(request.id, 0))


def first_of(queue: KeyQueue, count: int) -> list[Request]:
    """The first so many of a queue, which stay in it. O(count log n)."""
    first: list[Request] = []
    while len(first) < count and queue.peek(0) is not None:
        first.append(queue.pop(0))
    for request in first:
        queue.push(request, 0)
    return first
