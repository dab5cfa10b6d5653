"""Slow schedulers, written from the published pseudo-code alone, to compare the fast ones with.

They keep their waiting requests in a list that is sorted in every step, walk every running request, name every decode,
and count blocks by listing who holds which. They share no code with the schedulers they check: no draft, no queue, no
admission object.
"""

from __future__ import annotations

from policies.contract import View
from policies.plan import FOREVER, Mode, Plan, Report
from policies.request import Request

ORDERS = {
    "fcfs": lambda r: (r.arrival_ns, r.id),
    "priority": lambda r: (r.priority, r.arrival_ns, r.id),
    "sjf": lambda r: (r.hints.get("output_tokens", r.max_tokens), r.arrival_ns, r.id),
}


class Reference:
    """Waiting requests, and the books of one step."""

    def __init__(self, order: str = "fcfs", gate: str = "full_prompt", watermark: float = 0.0) -> None:
        self.order, self.gate, self.watermark = ORDERS[order], gate, watermark
        self.waiting: list[Request] = []
        self.members: list[Request] = []  # of a static batch

    def add(self, request: Request, now: int) -> None:
        self.waiting.append(request)

    def remove(self, request: Request, now: int) -> None:
        if request in self.waiting:
            self.waiting.remove(request)

    def on_report(self, report: Report) -> None:
        """Nothing to learn."""

    def plan(self, view: View, now: int) -> Plan:
        self.view, self.result = view, Plan()
        self.running = list(view.running.values())
        self.in_order = sorted(self.waiting, key=self.order)
        self.budget = view.max_num_batched_tokens
        self.new_blocks: dict[int, int] = {}  # request id -> blocks that this step gives it
        self.hit_blocks: set[int] = set()
        self.work: dict[int, tuple[Request, int]] = {}
        self.preempted: list[Request] = []
        self.admitted: list[Request] = []
        self.decide(now)
        for request, tokens in self.work.values():
            if request in self.running and request not in self.admitted and pending(request) == 1:
                self.result.decodes.append(request)
            else:
                self.result.chunks.append((request, tokens))
        self.waiting = [r for r in self.waiting if r not in self.admitted]
        return self.result

    def decide(self, now: int) -> None:
        raise NotImplementedError

    # Books

    def free(self) -> int:
        held = {block for r in [*self.running, *self.members] for block in r._blocks} | self.hit_blocks
        return self.view.num_blocks - len(held) - sum(self.new_blocks.values())

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.view.block_size)

    def fits(self, request: Request, tokens: int) -> bool:
        return self.blocks(request.num_computed_tokens + tokens) - request.num_blocks <= self.free()

    def give(self, request: Request, tokens: int) -> None:
        need = self.blocks(request.num_computed_tokens + tokens) - request.num_blocks
        self.new_blocks[request.id] = max(0, need)
        self.work[request.id] = (request, tokens)
        self.budget -= tokens

    def evict_last(self) -> Request:
        """Last in, first out, by recomputation; what this step had given it comes back."""
        victim = self.running.pop()
        self.preempted.append(victim)
        self.result.preempt.append((victim, Mode.RECOMPUTE))
        self.new_blocks.pop(victim.id, None)
        if victim.id in self.work:
            self.budget += self.work.pop(victim.id)[1]
        return victim

    def make_room(self, request: Request, tokens: int) -> bool:
        while not self.fits(request, tokens):
            if self.evict_last() is request:
                return False
        return True

    def admit(self, request: Request, limit: int, *, whole: bool = False, hold: int = 0) -> bool:
        """Start a waiting request with at most `limit` tokens; False where it does not fit."""
        hit = self.view.probe(request)
        tokens = min(request.num_tokens - hit.num_tokens, self.budget, limit)
        if len(self.running) >= self.view.max_num_seqs or tokens < 1 or not self.view.settled(request):
            return False
        if whole and hit.num_tokens + tokens < request.num_tokens:
            return False
        before = self.hit_blocks
        self.hit_blocks = before | {block.id for block in hit.blocks}
        first = self.blocks(max(hit.num_tokens + tokens, hold)) - len(hit.blocks)
        everything = max(first, self.blocks(request.num_tokens) - len(hit.blocks))
        room = {"full_prompt": everything <= self.free(), "watermark": True}[self.gate]
        room = room and self.free() - first >= self.watermark * self.view.num_blocks
        if self.free() < first or (self.running and not room):
            self.hit_blocks = before  # whoever holds them now may be preempted yet
            return False
        self.running.append(request)
        self.admitted.append(request)
        self.new_blocks[request.id] = first
        self.work[request.id] = (request, tokens)
        self.budget -= tokens
        if hold > hit.num_tokens + tokens:
            self.result.hold[request.id] = hold
        return True


def pending(request: Request) -> int:
    """Tokens it still has to compute; none where its cap is on its way."""
    if request.num_tokens - request.num_prompt_tokens >= request.max_tokens:
        return 0
    return request.num_tokens - request.num_computed_tokens


class ReferenceMixed(Reference):
    """vLLM v1's scheduler, in its two phases."""

    def __init__(
        self, order: str = "fcfs", gate: str = "full_prompt", watermark: float = 0.0, threshold: int = 0
    ) -> None:
        super().__init__(order, gate, watermark)
        self.most = threshold or 10**9

    def decide(self, now: int) -> None:
        for request in list(self.running):
            if request in self.preempted:
                break
            tokens = min(pending(request), self.budget, self.most)
            if tokens == 0:
                continue
            if not self.make_room(request, tokens):
                break
            self.give(request, tokens)
        if not self.preempted:
            for request in self.in_order:
                if not self.admit(request, self.most):
                    break


class ReferenceSarathi(Reference):
    """Sarathi-Serve: decodes, then partial prefills, then new ones, within one chunk budget."""

    def __init__(
        self, order: str = "fcfs", gate: str = "full_prompt", watermark: float = 0.0, chunk_size: int = 512
    ) -> None:
        super().__init__(order, gate, watermark)
        self.chunk_size = chunk_size

    def decide(self, now: int) -> None:
        def done() -> int:
            return sum(tokens for _, tokens in self.work.values())

        for request in list(self.running):
            if pending(request) == 1 and request not in self.preempted and self.budget and self.make_room(request, 1):
                self.give(request, 1)
        for request in list(self.running):
            tokens = min(pending(request), self.budget, self.chunk_size - done())
            if pending(request) > 1 and tokens > 0:
                self.give(request, tokens)
        if not self.preempted:
            for request in self.in_order:
                if not self.admit(request, self.chunk_size - done(), hold=request.num_tokens):
                    break


class ReferencePrefillFirst(Reference):
    """vLLM v0: prefills alone if there are any, else all decodes. A prompt beyond the budget goes alone, in chunks."""

    def decide(self, now: int) -> None:
        for request in self.running:
            if pending(request) > 1:
                self.give(request, min(pending(request), self.budget))
        if not self.work:
            for i, request in enumerate(self.in_order):
                beyond = request.num_tokens - self.view.probe(request).num_tokens > self.view.max_num_batched_tokens
                if beyond and i > 0:
                    break
                if not self.admit(request, 10**9, whole=not beyond, hold=request.num_tokens) or beyond:
                    break
        if not self.work:
            for request in list(self.running):
                if pending(request) == 1 and request not in self.preempted and self.budget:
                    if not self.make_room(request, 1):
                        break
                    self.give(request, 1)


class ReferenceStatic(Reference):
    """FasterTransformer's static batching: nobody joins a batch once it has formed, nothing is freed until it ends."""

    def __init__(
        self,
        order: str = "fcfs",
        gate: str = "full_prompt",
        watermark: float = 0.0,
        batch_size: int = 8,
        timeout_ms: float = 0.0,
    ) -> None:
        super().__init__(order, gate, watermark)
        self.batch_size, self.timeout_ns = batch_size, round(timeout_ms * 1e6)
        self.forming = True

    def decide(self, now: int) -> None:
        if not self.running:
            self.result.pin = [(member, now) for member in self.members if member.num_blocks]
            self.members = []
            self.forming = True
            oldest = min((r.arrival_ns for r in self.waiting), default=now)
            if len(self.waiting) < self.batch_size and oldest + self.timeout_ns > now:
                self.result.wake_at = oldest + self.timeout_ns if self.waiting else None
                return
        for request in self.running:
            if pending(request) > 1 and self.budget:
                self.give(request, min(pending(request), self.budget))
        if self.forming:
            self.form()
        if not self.work:
            for request in self.running:
                if pending(request) == 1 and self.budget:
                    self.give(request, 1)

    def form(self) -> None:
        for request in self.in_order:
            if len(self.members) == self.batch_size:
                break
            if self.budget == 0:
                return  # somebody may still join in the next step
            if not self.admit(request, 10**9, hold=request.num_prompt_tokens + request.max_tokens):
                break
            self.members.append(request)
            self.result.pin.append((request, FOREVER))
        self.forming = False
