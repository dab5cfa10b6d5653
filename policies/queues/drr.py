from __future__ import annotations

from collections import deque

from policies.draft import Draft
from policies.registry import register
from policies.request import Request
from policies.tenant_queue import SCALE, TenantQueue


@register("queue", "drr")
class Drr(TenantQueue):
    """Deficit round robin over tenants: each may spend a quantum of tokens in its turn, and pays debts with later ones.

    Tenants take turns in a ring. At the beginning of its turn a tenant whose deficit D <= 0 gets D += quantum. As long
    as D > 0 it goes on admitting its requests, first come first served: D -= w_p * input / weight at admission,
    D -= w_q / weight for each output token. As output is paid for when it comes, D may fall far below 0, and the tenant
    then passes its turns until enough quanta have come. A request that does not fit ends the admissions; the tenant
    keeps its turn without another quantum, unless its running requests have spent what was left by then.
    A tenant without waiting requests leaves the ring with what it has left (at most a quantum); one in debt goes on
    taking turns until it is paid.

    `quantum`: tokens; 0 is a twentieth of the KV cache, as published. `input_weight`, `output_weight`, `weights`: w_p,
    w_q, and shares as `a:2;b:1` (see `TenantQueue`).
    Where this departs: classic DRR (Shreedhar and Varghese, SIGCOMM 1995) serves only what D covers, takes the whole
    cost beforehand, and forgets what is left when a queue runs empty; here the cost of output is not known then, so
    this is the surplus form of the published code for VTC's baseline (MDRR). The token that a prefill samples is free
    there and charged here. Rounds in which nobody who waits gets out of debt are skipped in one go.
    Cost: O(1) a request, O(tenants) a round of turns.
    Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, and its published code.
    """

    def __init__(
        self, quantum: int = 0, input_weight: float = 1.0, output_weight: float = 2.0, weights: str = ""
    ) -> None:
        super().__init__(input_weight, output_weight, weights)
        if quantum < 0:
            raise ValueError(f"quantum must be 0 (a twentieth of the KV cache) or more, not {quantum}")
        self._given = quantum
        self._quantum = max(1, quantum) * SCALE
        self.deficits: dict[str, int] = {}  # in millionths of a token
        self._ring: deque[str] = deque()
        self._in_ring: set[str] = set()
        self._in_turn = False  # the first in the ring has had its quantum

    def begin(self, draft: Draft, now: int) -> None:
        super().begin(draft, now)
        if not self._given:
            self._quantum = max(1, draft.view.num_blocks * draft.view.block_size // 20) * SCALE

    def choose(self, now: int) -> Request | None:
        passed = 0
        while self._waiting:
            tenant = self._ring[0]
            deficit, head = self.deficits[tenant], self.head(tenant)
            if not self._in_turn:
                self._in_turn = True
                if deficit < 0 or (deficit == 0 and head is not None):
                    deficit = self.deficits[tenant] = deficit + self._quantum
            if head is not None and deficit > 0:
                return head
            self._end_turn()
            passed += 1
            if passed >= len(self._ring):
                self._skip_rounds()
                passed = 0
        return None

    def pop(self, now: int) -> Request:
        request = super().pop(now)
        if self.head(request.tenant) is None or self.deficits[request.tenant] <= 0:
            self._end_turn()
        return request

    def _end_turn(self) -> None:
        self._in_turn = False
        tenant = self._ring.popleft()
        if tenant in self._waiting or self.deficits[tenant] < 0:
            self._ring.append(tenant)
        else:
            self._in_ring.discard(tenant)

    def _skip_rounds(self) -> None:
        """Everybody has passed: all the rounds at once before that in which somebody who waits is out of debt."""
        if not self._waiting:
            return
        rounds = min(-self.deficits[tenant] // self._quantum for tenant in self._waiting)
        if rounds <= 0:
            return
        ring = self._ring
        self._ring = deque()
        for tenant in ring:
            until_paid = -(self.deficits[tenant] // self._quantum)
            self.deficits[tenant] += max(0, min(rounds, until_paid)) * self._quantum
            if tenant in self._waiting or until_paid > rounds:
                self._ring.append(tenant)
            else:
                self._in_ring.discard(tenant)  # it is paid in one of these rounds, and leaves

    def charge(self, tenant: str, amount: int) -> None:
        self.deficits[tenant] = self.deficits.get(tenant, 0) - amount

    def will_queue(self, tenant: str, now: int, *, back: bool) -> None:
        if tenant not in self._in_ring:
            self._in_ring.add(tenant)
            self._ring.append(tenant)
            self.deficits.setdefault(tenant, 0)
