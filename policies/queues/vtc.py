from __future__ import annotations

import heapq
from collections.abc import Mapping

from policies import registry
from policies.registry import register
from policies.request import Request
from policies.tenant_queue import TenantQueue


@register("queue", "vtc")
class Vtc(TenantQueue):
    """Virtual Token Counter: the tenant that was served least goes first, and nobody saves up while idle.

    Each tenant u has a counter c_u of the service it got, in tokens by their cost. Next is the earliest request of the
    tenant with the smallest counter among those who wait; if it does not fit, nobody is admitted. On admission
    c_u += w_p * input / weight_u; for each output token c_u += w_q / weight_u (see `TenantQueue`).
    The lift: when a request comes to a tenant with nobody waiting, c_u = max(c_u, the smallest counter of those who
    wait); when nobody waits at all, max(c_u, counter of the tenant that was the last to have one waiting).

    `input_weight`, `output_weight`: w_p and w_q. `weights`: shares by tenant, as `a:2;b:1`; 1 for who is not named.
    `lift`: `on` is the paper's; `queued` lifts only to those who wait, as the published code does, so that a tenant
    that comes back to an empty queue claims all that it did not use; `off` never lifts, which is least counter first
    (LCF), the paper's negative control.
    `predictor`: charge so many output tokens at admission already; tokens beyond the prediction are charged as they
    come, tokens short of it are given back at the end (section 4.4, VTC with length prediction). The published code
    predicts by an exponentially smoothed mean of a tenant's lengths where the paper has the mean of its last 5, which
    is `moving_average`.

    What is proved, for requests that run to their end once admitted: with L the longest input and M the most tokens
    that the running requests may have in memory, the counters of any two tenants who wait differ by at most
    U = max(w_p * L, w_q * M), the service that two of them get in any interval in which both have requests waiting by
    at most 2U (of weight 1). M is the KV cache under `admission=reserve_max`, which keeps a place for each request up
    to its cap, as the paper does. Where memory is promised more than once (`watermark`, `full_prompt`), M is what those
    that run at once come to by their ends, which may be more than there is. A preemption takes no service back and
    charges none: the request waits at the head of its tenant, and what it has to compute again is charged to nobody. So
    the bound is one on tokens delivered, not on the time of the device, and holds with that M. Under `lag=1` charges
    come a step late, which adds w_q for each running request of a tenant.

    Where the published code departs from this: the token that a prefill samples is free there, here it costs w_q as the
    service of the paper's section 3 counts every output token. Ties go by the arrival of the first requests.
    Cost: O(log tenants) a request, O(tenants that decode) a step.
    Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, algorithm 2 and section 4.
    """

    def __init__(
        self,
        input_weight: float = 1.0,
        output_weight: float = 2.0,
        weights: str = "",
        lift: str = "on",
        predictor: str = "none",
        oracle: Mapping[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(input_weight, output_weight, weights)
        if lift not in ("on", "queued", "off"):
            raise ValueError(f"lift must be on, queued or off, not {lift!r}")
        self._lift = lift
        if predictor != "none":
            self._predictor = registry.make_inner("predictor", predictor, oracle=oracle, seed=seed)
        self.clairvoyant = registry.is_clairvoyant(self._predictor)
        self.counters: dict[str, int] = {}  # in millionths
        self._last_to_leave: str | None = None
        self._heap: list[tuple[int, int, int, str]] = []  # (counter, *key of the head, tenant), as low as now or lower

    def choose(self, now: int) -> Request | None:
        heap = self._heap
        while heap:
            tenant = heap[0][-1]
            head = self.head(tenant)
            if head is None:
                heapq.heappop(heap)
                continue
            place = self._place(tenant, head)
            if place == heap[0]:
                return head
            if place > heap[0]:
                heapq.heapreplace(heap, place)
            else:
                heapq.heappop(heap)  # it has a lower entry, which is the true one
        return None

    def _place(self, tenant: str, head: Request) -> tuple[int, int, int, str]:
        return (self.counters.get(tenant, 0), *head.key, tenant)

    def charge(self, tenant: str, amount: int) -> None:
        self.counters[tenant] = self.counters.get(tenant, 0) + amount
        if amount < 0:
            self.has_head(tenant)

    def has_head(self, tenant: str) -> None:
        """It may be further ahead than its entries say. (What puts it back is found when an entry comes up.)"""
        head = self.head(tenant)
        if head is not None:
            heapq.heappush(self._heap, self._place(tenant, head))
        if len(self._heap) > 2 * len(self._waiting) + 64:
            heads = [(one, self.head(one)) for one in self._waiting]
            self._heap = [self._place(one, head) for one, head in heads if head is not None]
            heapq.heapify(self._heap)

    def will_queue(self, tenant: str, now: int, *, back: bool) -> None:
        if self._lift == "off" or back:
            return
        least = self.choose(now)
        to = least.tenant if least is not None else self._last_to_leave if self._lift == "on" else None
        if to is not None:
            self.counters[tenant] = max(self.counters.get(tenant, 0), self.counters.get(to, 0))

    def has_left(self, tenant: str) -> None:
        self._last_to_leave = tenant
