from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.contract import CostModel, Queue, View
from policies.costing import decode_ns, prefill_ns
from policies.draft import Draft
from policies.plan import Mode, Plan, Report
from policies.qoe import Column, expected_area, read_on
from policies.registry import register
from policies.request import Request, State
from policies.schedulers.mixed import Mixed


@register("scheduler", "andes")
class Andes(Mixed):
    """Andes: serves those whose users would miss it most a token of memory, and stops those with a full buffer.

    It goes by QoE (`policies.qoe`): tokens shown to the user against those expected, from `slo.ttft_ns` on, one every
    `slo.tpot_ns`. While there is plenty of everything it is `mixed`. A step is tight when somebody waits and slots are
    full or less than 1 - `memory` of the blocks are free, when somebody is paused, or when a step of all that run takes
    longer than the shortest TPOT. Then, over the running requests, the paused ones and the first `pool` of the queue:

    1. for some batch sizes B: gain_i = QoE_i(now + horizon) if served at the speed of a batch of B, less QoE_i(now +
       horizon) if not; the most gain a token of context goes first, as many as memory takes, B at most (greedy
       knapsack); those who cannot be preempted any more go before all others;
    2. the B with the largest sum of gains is best, the larger one where equal. B runs from the largest batch that is
       as fast as the shortest TPOT to the one that fills the memory, `sizes` of them;
    3. running requests outside the best set are preempted, the others run or start.

    `horizon_ms`; `cap`: preemptions a request; `ttft_ms`, `tokens_per_s`: what users expect who say nothing (1 s and a
    reading speed of 4.8).
    Where this departs: the formulas are rebuilt from the paper's description. The paper swaps out to host memory; here
    the preempted keep their blocks (KEEP) as long as memory is not wanted, and then are computed again, those with the
    least priority first. So where slots are short, pausing costs nothing and a larger `cap` pays; where memory is, each
    preemption computes a context again, and most of the gain is in who starts. The paper caps the mean of preemptions
    over all requests, here each has its own cap. Answers' lengths are unknown, so the expected curve does not end. What
    was delivered between two looks at a request is taken to have come evenly; tokens of a step in flight count as
    delivered. The objective is the mean QoE alone.
    O(running) a step; in a tight one the candidates are sorted once a size, in NumPy columns: 1 ms with 256 running and
    64 looked at, and more where many are preempted or short of memory, however many wait.
    Source: Liu et al., "Andes", arXiv 2404.16283, section 4.
    """

    needs_cost = True

    def __init__(
        self,
        queue: Queue,
        horizon_ms: float = 10_000.0,
        cap: int = 1,
        memory: float = 0.9,
        pool: int = 64,
        sizes: int = 4,
        ttft_ms: float = 1000.0,
        tokens_per_s: float = 4.8,
    ) -> None:
        super().__init__(queue)
        if horizon_ms <= 0 or ttft_ms < 0 or tokens_per_s <= 0:
            raise ValueError("horizon_ms and tokens_per_s must be above 0, ttft_ms at least 0")
        if cap < 0 or not 0 <= memory <= 1 or pool < 1 or sizes < 1:
            raise ValueError("cap must be at least 0, memory between 0 and 1, pool and sizes at least 1")
        self._horizon = horizon_ms * 1e6
        self._cap = cap
        self._memory = memory
        self._pool_size = pool
        self._sizes = sizes
        self._ttft_ns = ttft_ms * 1e6
        self._tpot_ns = 1e9 / tokens_per_s
        self._pool: dict[int, Request] = {}  # waiting requests that are looked at in tight steps
        self._readers: dict[int, tuple[float, float, float, float]] = {}  # time, tokens, shown, area at the last look
        self._waits: dict[int, tuple[tuple[int, int], int]] = {}  # tokens to compute, behind how many: nanoseconds

    def add(self, request: Request, now: int) -> None:
        if request.num_output_tokens:  # somebody is reading it: always looked at
            self._pool[request.id] = request
        else:
            super().add(request, now)

    def remove(self, request: Request, now: int) -> None:
        super().remove(request, now)
        self._pool.pop(request.id, None)
        self._forget(request)

    def on_report(self, report: Report) -> None:
        super().on_report(report)
        for request, _, _ in report.finished:
            self._forget(request)

    def _forget(self, request: Request) -> None:
        self._readers.pop(request.id, None)
        self._waits.pop(request.id, None)

    def plan(self, view: View, now: int) -> Plan:
        cost = view.cost
        assert cost is not None, "a scheduler that needs a cost model is never put where there is none"
        if not self._is_tight(view, cost):
            for request in self._pool.values():
                self.queue.push(request, now)
            self._pool.clear()
            return super().plan(view, now)
        draft = self.start(view, now)
        while len(self._pool) < self._pool_size and self.queue.peek(now) is not None:
            request = self.queue.pop(now)
            self._pool[request.id] = request
        for request in view.paused.values():
            self.queue.remove(request)
            self._pool[request.id] = request
        running = [r for r in view.running.values() if r.num_output_tokens < r.max_tokens]
        candidates = [*running, *self._pool.values()]
        if candidates:
            self._enact(view, draft, *self._best(view, cost, candidates, now), now)
        return draft.finish()

    def _tpot(self, request: Request) -> float:
        return self._tpot_ns if request.slo is None or request.slo.tpot_ns is None else request.slo.tpot_ns

    def _is_tight(self, view: View, cost: CostModel) -> bool:
        if view.paused:
            return True
        full = len(view.running) >= view.max_num_seqs
        if view.num_waiting and (full or view.num_free_blocks < (1 - self._memory) * view.num_blocks):
            return True
        if not view.running:
            return False
        context = sum(r.num_tokens for r in view.running.values())
        return decode_ns(cost, len(view.running), context) > min(map(self._tpot, view.running.values()))

    def _best(
        self, view: View, cost: CostModel, candidates: Sequence[Request], now: int
    ) -> tuple[list[Request], list[Request], int]:
        """Who is to run, and who is not, both by priority; and how many blocks the former want that they lack."""
        lengths, tpots = [r.num_tokens for r in candidates], [self._tpot(r) for r in candidates]
        users, context = self._look(candidates, lengths, tpots, cost, now), np.array(lengths, float)
        blocks = np.array(lengths) // view.block_size + 1  # with the next token
        held = np.array([r.num_blocks for r in candidates])
        memory = view.num_free_blocks + int(held.sum())
        forced = np.array([r.num_preemptions >= self._cap and r.state is State.RUNNING for r in candidates])
        place, mean = np.arange(len(candidates)), sum(lengths) / len(lengths)
        best, chosen, others = -1.0, place, place
        for size in self._batch_sizes(view, cost, min(tpots), mean, np.sort(blocks), memory):
            gain = users.gain(1 / decode_ns(cost, size, round(size * mean)), self._horizon)
            order = np.lexsort((place, -gain / context, ~forced))
            taken = knapsack(blocks[order], size, memory)
            total = float(np.cumsum(gain[order[taken]])[-1]) if taken.any() else 0.0
            if total > best:
                best, chosen, others = total, order[taken], order[~taken]
        wanted = int(np.maximum(0, blocks - held)[chosen].sum())
        return [candidates[i] for i in chosen.tolist()], [candidates[i] for i in others.tolist()], wanted

    def _batch_sizes(
        self, view: View, cost: CostModel, tpot: float, context: float, blocks: NDArray[np.int64], memory: int
    ) -> list[int]:
        """From the one that fills slots or memory down to the largest at which every user is kept up with."""
        largest = max(1, int(np.searchsorted(np.cumsum(blocks[: view.max_num_seqs]), memory, "right")))
        low, high = 1, largest  # the largest batch within the TPOT, by bisection
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if decode_ns(cost, middle, round(middle * context)) <= tpot else (low, middle - 1)
            )
        steps = max(1, self._sizes - 1)
        return sorted({largest - (largest - low) * k // steps for k in range(steps + 1)}, reverse=True)

    def _look(
        self, requests: Sequence[Request], lengths: Sequence[int], tpots: Sequence[float], cost: CostModel, now: int
    ) -> Users:
        """What each user has been shown by now."""
        rows, readers, default = [], self._readers, self._ttft_ns
        for request, tpot, length in zip(requests, tpots, lengths, strict=True):
            slo, first = request.slo, request.first_token_ns
            ttft = default if slo is None or slo.ttft_ns is None else slo.ttft_ns
            before = readers.get(request.id) or (float(now if first is None else first), 0.0, 0.0, 0.0)
            wait = 0 if request.num_pending_tokens == 1 else self._prefill_ns(request, cost)
            rows.append((*before, request.arrival_ns + ttft, tpot, wait, length - request.num_prompt_tokens))
        time, tokens, shown, area, due_at, tpot, waits, delivered = np.array(rows, float).T
        span, pace = np.maximum(0.0, now - time), 1 / tpot
        rate = (delivered - tokens) / np.where(span > 0, span, 1.0)
        lead = np.maximum(0.0, due_at - time)
        more, shown = read_on(shown, tokens, pace, lead, np.zeros_like(span), rate, span)
        shown, area = np.minimum(shown, delivered), area + more
        looks = zip(requests, delivered.tolist(), shown.tolist(), area.tolist(), strict=True)
        for request, count, by_now, total in looks:
            if count:
                readers[request.id] = (float(now), count, by_now, total)
        return Users(delivered, shown, pace, now - due_at, waits)

    def _prefill_ns(self, request: Request, cost: CostModel) -> int:
        """What the rest of its prefill takes: while it waits, the same at every look."""
        key, known = (request.num_pending_tokens, request.num_computed_tokens), self._waits.get(request.id)
        if known is None or known[0] != key:
            known = self._waits[request.id] = (key, prefill_ns(cost, *key))
        return known[1]

    def _enact(
        self, view: View, draft: Draft, chosen: list[Request], others: list[Request], wanted: int, now: int
    ) -> None:
        for request in reversed(others):
            runs, takes = request.state is State.RUNNING, wanted > draft.blocks_left
            if runs and request.num_preemptions < self._cap:
                draft.preempt(request, Mode.RECOMPUTE if takes else Mode.KEEP)
            elif request.state is State.PAUSED and takes:
                self._pool.pop(request.id, None)
                draft.preempt(request, Mode.RECOMPUTE)
        stand_still = any(r.state is State.RUNNING and r.id not in draft.preempted for r in others)
        if draft.preempted or stand_still or not draft.run_everyone():
            self._run(draft, chosen, not stand_still and draft.run_all_decodes(), now)
        for request in chosen:
            if request.state is not State.RUNNING and draft.admit(request):
                self._pool.pop(request.id, None)
        if not draft.num_tokens and not draft.plan.preempt:
            for request in view.paused.values():  # shared blocks were counted twice: start from free memory
                if view.settled(request):
                    self._pool.pop(request.id, None)
                    draft.preempt(request, Mode.RECOMPUTE)

    def _run(self, draft: Draft, chosen: list[Request], decodes_done: bool, now: int) -> None:
        """Tokens for those of the chosen that run, decodes before prefills."""
        for decodes in (False,) if decodes_done else (True, False):
            for request in chosen:
                tokens = min(request.num_pending_tokens, draft.tokens_left)
                if request.state is not State.RUNNING or (request.num_pending_tokens == 1) is not decodes:
                    continue
                if tokens and request.id not in draft.preempted:
                    draft.run_or_preempt(request, tokens, now)


def knapsack(blocks: NDArray[np.int64], size: int, memory: int) -> NDArray[np.bool_]:
    """Which of a list are taken, first come, first served: each that still fits, at most `size`."""
    taken = np.zeros(len(blocks), bool)
    if blocks[:size].sum() <= memory:
        taken[:size] = True
        return taken
    left = memory
    for i, count in enumerate(blocks.tolist()):
        if count <= left:
            taken[i] = True
            left -= count
            size -= 1
            if not size:
                break
    return taken


@dataclass(frozen=True, slots=True)
class Users:
    """What the users of some requests have got by now, a column each."""

    delivered: Column
    shown: Column
    pace: Column  # tokens a ns
    since_due: Column  # ns since the first token was due; negative before
    wait: Column  # ns of prefill before the next token

    def gain(self, rate: float, horizon: float) -> Column:
        """How much better QoE will be after `horizon` ns if served, at `rate` tokens a ns, than if not."""
        zero, lead = np.zeros_like(self.pace), np.maximum(0.0, -self.since_due)
        span = zero + horizon
        served, _ = read_on(self.shown, self.delivered, self.pace, lead, self.wait, zero + rate, span)
        idle, _ = read_on(self.shown, self.delivered, self.pace, lead, self.wait, zero, span)
        expected = expected_area(self.pace, self.since_due + horizon)
        return np.where(expected > 0, (served - idle) / np.where(expected > 0, expected, 1.0), 0.0)
