"""Waiting requests by tenant, and what each tenant is charged: what fair queues have in common."""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from policies.contract import LengthPredictor
from policies.draft import Draft
from policies.key_queue import KeyQueue, first_of
from policies.plan import Report
from policies.request import Request

SCALE = 1_000_000
"""Charges are whole numbers: millionths of what one token of cost 1 is to a tenant of weight 1."""


def parse_weights(text: str) -> dict[str, float]:
    """`a:2;b:0.5` as numbers by tenant. Raises ValueError."""
    weights: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        tenant, colon, value = part.rpartition(":")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not colon or tenant in weights or not 1 / SCALE <= weight <= SCALE:
            raise ValueError(
                f"weights must read tenant:weight;... with each tenant once and numbers above 0, not {text!r}"
            )
        weights[tenant] = weight
    return weights


class InOrderOfArrival(KeyQueue):
    """One tenant's requests. A preempted one is again ahead of those of its tenant that came later."""

    def rank(self, request: Request) -> float:
        return 0.0


@dataclass(slots=True)
class Account:
    """One admitted request: what its tenant was charged for, and what it got."""

    request: Request
    num_input: int  # input tokens charged
    num_prepaid: int  # output tokens charged at admission
    num_got: int = 0  # output tokens by the reports, without those since it joined the decode group
    joined_at: int | None = None  # steps of the group when it joined; None: it is no member
    counted: bool = False  # whether it is a member whose every token is charged


class TenantQueue(ABC):
    """Requests wait by tenant, first come first served within each, and tenants are charged for what they get.

    A request costs its tenant (input_weight * input tokens + output_weight * output tokens) / weight of the tenant:

    - Its input once, at its first admission. `pop` charges it, so that the next choice of the same plan knows of it;
      if the request comes back without having run, it is taken back. A preempted request that is admitted again, and
      computed again, costs nothing more: it is not its tenant's doing.
    - Each output token, also the one that the prefill samples, when a report brings it. With a predictor, as many as it
      predicts are charged at admission, and those beyond them as they come.
    - At its end the charge is set right, to the output tokens that it ended with. For one that was cancelled these are
      the tokens computed for it by then.

    A step in which the decode group runs is charged by a count of members for each tenant, moved by who joins and
    leaves: O(tenants that decode) a step, O(log running) a change.
    A request that ran before this object was put in place is not charged for what it had got by then; one that was in
    the decode group is charged for the rest at its end.
    Requests that come between two plans are taken in together, in order of arrival.
    """

    def __init__(self, input_weight: float, output_weight: float, weights: str) -> None:
        if not 0 <= input_weight <= SCALE or not 0 <= output_weight <= SCALE or input_weight + output_weight == 0:
            raise ValueError("input_weight and output_weight must be 0 or more, and not both 0")
        self._prices = (input_weight, output_weight)
        self._weights = parse_weights(weights)
        self._costs: dict[str, tuple[int, int]] = {}
        self._waiting: dict[str, InOrderOfArrival] = {}  # without those who have nobody waiting
        self._accounts: dict[int, Account] = {}
        self._unsure: dict[int, Account] = {}  # popped, and no report yet
        self._new: dict[int, Request] = {}  # pushed since the queue was last looked at
        self._group_steps = 0
        self._num_counted: dict[str, int] = {}  # members whose tokens are charged, by tenant
        self._count_from: list[tuple[int, int]] = []  # (step of the group from which on it counts, id)
        self._predictor: LengthPredictor | None = None
        self._fresh = True

    # What a policy says

    @abstractmethod
    def choose(self, now: int) -> Request | None:
        """The waiting request to admit next."""

    @abstractmethod
    def charge(self, tenant: str, amount: int) -> None:
        """Something was given to this tenant, or with a negative amount was not given after all."""

    def will_queue(self, tenant: str, now: int, *, back: bool) -> None:  # noqa: B027  (not all need it)
        """Its first request is about to wait. `back`: it was popped before, and did not get to run."""

    def has_head(self, tenant: str) -> None:  # noqa: B027
        """Another request than before is the first of this tenant, one that came earlier."""

    def has_left(self, tenant: str) -> None:  # noqa: B027
        """Its last waiting request is gone."""

    def num_input(self, request: Request, *, ran: bool) -> int:
        """Input tokens to charge for. `ran`: the control plane has admitted it; before, it is an estimate."""
        return request.num_prompt_tokens

    # What it can look at

    def head(self, tenant: str) -> Request | None:
        """The first waiting request of a tenant."""
        queue = self._waiting.get(tenant)
        return None if queue is None else queue.peek(0)

    def cost(self, tenant: str) -> tuple[int, int]:
        """What an input token and an output token cost it."""
        cost = self._costs.get(tenant)
        if cost is None:
            weight = self._weights.get(tenant, 1.0)
            cost = self._costs[tenant] = (
                round(SCALE * self._prices[0] / weight),
                round(SCALE * self._prices[1] / weight),
            )
        return cost

    # The queue

    def push(self, request: Request, now: int) -> None:
        self._new[request.id] = request

    def _take_in(self, now: int) -> None:
        """Those who came since the last look, in order of arrival: whatever the order in which they were handed in."""
        for request in sorted(self._new.values(), key=lambda request: request.key):
            tenant = request.tenant
            account = self._accounts.get(request.id)
            ran = request.first_scheduled_ns is not None
            if account is not None and not ran:
                self._close(account, 0)
            elif account is None and ran:  # before this object was put in place
                self._accounts[request.id] = Account(request, 0, 0, request.num_output_tokens)
            if tenant not in self._waiting:
                self.will_queue(tenant, now, back=account is not None and not ran)
                self._waiting[tenant] = InOrderOfArrival()
            self._waiting[tenant].push(request, now)
            if self.head(tenant) is request:
                self.has_head(tenant)
        self._new.clear()

    def peek(self, now: int) -> Request | None:
        if self._new:
            self._take_in(now)
        return self.choose(now)

    def pop(self, now: int) -> Request:
        request = first_of(self, now)
        if request.id not in self._accounts:
            self._unsure[request.id] = self._open(request, self.num_input(request, ran=False))
        self._take(request)
        return request

    def remove(self, request: Request) -> None:
        self._new.pop(request.id, None)
        self._take(request)
        account = self._accounts.get(request.id)
        if account is not None and request.gone:
            self._close(account, request.num_output_tokens)

    def _take(self, request: Request) -> None:
        queue = self._waiting.get(request.tenant)
        if queue is not None:
            queue.remove(request)
            if queue.peek(0) is None:
                del self._waiting[request.tenant]
                self.has_left(request.tenant)

    def begin(self, draft: Draft, now: int) -> None:
        if self._fresh:
            self._fresh = False
            for request in draft.view.running.values():
                if request.id not in self._accounts:
                    self._accounts[request.id] = Account(request, 0, 0, request.num_output_tokens)
        for account in [a for a in self._unsure.values() if a.request.state.ended]:
            self._close(account, account.request.num_output_tokens)  # shed by a plan of which there may be no report
        self._take_in(now)

    # The books

    def on_report(self, report: Report) -> None:
        step = report.step
        for request in step.admitted:
            account = self._accounts.get(request.id)
            if account is not None:
                self._is_sure(account)
            elif not request.state.ended:
                self._open(request, self.num_input(request, ran=True))
        for request in step.left:
            self._leave(request.id)
        if step.decode_all:
            for request in step.joined:
                self._join(request.id)
            self._group_steps += 1
            self._count_those_due()
            for tenant, count in self._num_counted.items():
                self.charge(tenant, count * self.cost(tenant)[1])
            for request in step.capped:
                self._leave(request.id)
        for request in (*step.decodes, *(chunk.request for chunk in step.chunks if chunk.samples)):
            account = self._accounts.get(request.id)
            if account is not None:
                account.num_got += 1
                if account.num_got > account.num_prepaid:
                    self.charge(request.tenant, self.cost(request.tenant)[1])
        for request, _ in step.dropped:
            if request.id in self._accounts:
                self._close(self._accounts[request.id], request.num_output_tokens)
        for request, _, num_output_tokens in report.finished:
            if request.id in self._accounts:
                self._close(self._accounts[request.id], num_output_tokens)
            if self._predictor is not None:
                self._predictor.on_end(request, num_output_tokens)

    def _open(self, request: Request, num_input: int) -> Account:
        prepaid = 0 if self._predictor is None else round(self._predictor.predict(request))
        account = self._accounts[request.id] = Account(request, num_input, prepaid)
        per_input, per_output = self.cost(request.tenant)
        self.charge(request.tenant, num_input * per_input + prepaid * per_output)
        return account

    def _is_sure(self, account: Account) -> None:
        """It has run: its input is what was computed for it."""
        request = account.request
        if self._unsure.pop(request.id, None) is not None:
            self._set_input(account, self.num_input(request, ran=True))

    def _set_input(self, account: Account, num_input: int) -> None:
        if num_input != account.num_input:
            tenant = account.request.tenant
            self.charge(tenant, (num_input - account.num_input) * self.cost(tenant)[0])
            account.num_input = num_input

    def _close(self, account: Account, num_output: int) -> None:
        """It has ended with so many tokens, or never ran: then it cost nothing."""
        request, tenant = account.request, account.request.tenant
        self._leave(request.id)
        if request.first_scheduled_ns is None:
            self._set_input(account, 0)
        else:
            self._is_sure(account)
        self._unsure.pop(request.id, None)
        del self._accounts[request.id]
        difference = num_output - max(account.num_prepaid, account.num_got)
        if difference:
            self.charge(tenant, difference * self.cost(tenant)[1])

    def _join(self, request_id: int) -> None:
        account = self._accounts.get(request_id)
        if account is None or account.joined_at is not None:
            return
        account.joined_at = self._group_steps
        heapq.heappush(
            self._count_from, (self._group_steps + 1 + max(0, account.num_prepaid - account.num_got), request_id)
        )

    def _count_those_due(self) -> None:
        """From this step of the group on, their tokens are beyond what was prepaid."""
        due = self._count_from
        while due and due[0][0] <= self._group_steps:
            account = self._accounts.get(heapq.heappop(due)[1])
            # Who has left the group meanwhile, and may have come back, has left an old entry behind.
            if account is None or account.joined_at is None or account.counted:
                continue
            if account.num_got + self._group_steps - account.joined_at > account.num_prepaid:
                account.counted = True
                tenant = account.request.tenant
                self._num_counted[tenant] = self._num_counted.get(tenant, 0) + 1

    def _leave(self, request_id: int) -> None:
        account = self._accounts.get(request_id)
        if account is None or account.joined_at is None:
            return
        account.num_got += self._group_steps - account.joined_at
        account.joined_at = None
        if account.counted:
            account.counted = False
            tenant = account.request.tenant
            self._num_counted[tenant] -= 1
            if not self._num_counted[tenant]:
                del self._num_counted[tenant]
