from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from policies.backlog import Backlog
from policies.block_pool import num_blocks
from policies.contract import CostModel, Replica, Route, TransferCost
from policies.costing import decode_ns, prefill_ns
from policies.pools import PromisedBlocks, check_prefill, split
from policies.registry import register
from policies.request import Request
from policies.routing import num_uncached_tokens

REJECT = ("never", "now", "predicted")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request would get at one prefill replica. Times in ns."""

    ttft_ns: int
    prefill_ns: int
    replica: int
    kv_from: int | None


@dataclass(frozen=True, slots=True)
class Sent:
    """A request in flight, and when it was expected to have its first token."""

    request: Request
    prefill: int
    decode: int
    first_token_ns: int

    def decodes_at(self, time: int, decode_ns: int) -> bool:
        """Whether it decodes then, should every request decode for `decode_ns`."""
        known = self.request.first_token_ns
        begin = self.first_token_ns if known is None else known
        return begin <= time < begin + decode_ns


@register("router", "mooncake")
class Mooncake:
    """Mooncake's conductor: the least predicted time to first token, prefixes fetched where worth it, early rejection.

    Qin et al., "Mooncake: A KVCache-centric Disaggregated Architecture for LLM Serving", arXiv:2407.00079 and FAST
    2025, Algorithm 1. For each prefill replica p, with the leading blocks of the prompt that it has cached (local) and
    the most that any prefill replica has (best):

        if best > threshold * local:  TTFT = transfer(best - local) + queue(p) + prefill(prompt, best cached)
        else:                         TTFT =                          queue(p) + prefill(prompt, local cached)

    The least TTFT wins (ties: the lowest id). If best is to be fetched it comes from the lowest id that has it, and p
    has a copy from then on, so that what many ask for spreads. `threshold=none` never fetches: the paper's cache-aware
    scheduling without balancing. The decode goes where a step would be shortest with all that are assigned there.

    `transfer` is the link's time when idle; `prefill` the cost model's step of the uncached tokens; `queue` the sum of
    those of the requests sent to p without a first token, less the time since the first of them began.

    Rejection (section 7 of the report): a request is refused if the TTFT or the time of a decode step (TBT) would be
    above its objective. `reject=now` takes the decodes that its decode replica has now (early rejection), `predicted`
    (the default) those that it will have when the request comes there: those whose first token is expected by then are
    added, those that decode for longer than `decode_ms` by then are taken off (early rejection based on prediction; it
    is worth as much as outputs are alike); `never` refuses nobody. Objectives are `ttft_ms` and `tbt_ms` (none by
    default) for requests without a `Slo` of their own, else those of the `Slo` (`ttft_ns`, `tpot_ns`) if it says
    `droppable`.

    Other knobs: `prefill`, so many replicas, those with the lowest ids, prefill (1); `threshold` 1.5 and `decode_ms`
    10,000 are ours, as the paper gives no values. Where one pool is empty, both phases are in one place.

    The paper's prediction averages the load over all decode replicas; here it is that of the chosen one. Its cache is
    in host memory, that of all nodes; here it is the prefill replicas' own prefix caches, so that what decode replicas
    have generated is computed anew in the next turn. How busy the links are is not looked at.

    O(R * matches + what has begun), with an objective for TBT O(requests in flight); memory: what is in flight.
    """

    moves_kv = True

    def __init__(
        self,
        cost: CostModel,
        transfer: TransferCost,
        prefill: int = 1,
        threshold: float | None = 1.5,
        reject: str = "predicted",
        ttft_ms: float | None = None,
        tbt_ms: float | None = None,
        decode_ms: float = 10_000.0,
        block_size: int = 16,
    ) -> None:
        check_prefill(prefill)
        if threshold is not None and threshold < 1:
            raise ValueError(f"threshold must be at least 1, or none, not {threshold}")
        if reject not in REJECT:
            raise ValueError(f"reject must be one of {', '.join(REJECT)}, not {reject}")
        for name, ms in (("ttft_ms", ttft_ms), ("tbt_ms", tbt_ms), ("decode_ms", decode_ms)):
            if ms is not None and ms <= 0:
                raise ValueError(f"{name} must be above 0, not {ms}")
        self._cost = cost
        self._transfer = transfer
        self._prefill = prefill
        self._threshold = threshold
        self._reject = reject
        self._ttft_ns = None if ttft_ms is None else round(1e6 * ttft_ms)
        self._tbt_ns = None if tbt_ms is None else round(1e6 * tbt_ms)
        self._decode_ns = round(1e6 * decode_ms)
        self._block_size = block_size
        self._backlogs: dict[int, Backlog] = {}
        self._promised = PromisedBlocks()
        self._sent: dict[int, Sent] = {}

    def route(self, request: Request, keys: Sequence[bytes], replicas: Sequence[Replica], now: int) -> Route | None:
        prefills, decodes = split(replicas, self._prefill)
        plan = self._choose(self._plans(request, keys, prefills, now))
        together = prefills == decodes
        decode = plan.replica if together else min((self._load_ns(request, r), r.id) for r in decodes)[1]
        cost = next(replica.cost for replica in decodes if replica.id == decode) or self._cost
        if self._misses(request, plan, decode, cost, now):
            return None
        self._send(request, Sent(request, plan.replica, decode, now + plan.ttft_ns), plan.prefill_ns)
        return Route(plan.replica, None if together else decode, plan.kv_from)

    def on_end(self, request: Request, replica: int, now: int) -> None:
        self._forget(request)

    def _forget(self, request: Request) -> None:
        sent = self._sent.pop(request.id, None)
        if sent is None:
            return
        self._promised.end(request)
        backlog = self._backlogs.get(sent.prefill)
        if backlog is not None:
            backlog.remove(request.id)
            if not backlog:
                del self._backlogs[sent.prefill]

    def _plans(self, request: Request, keys: Sequence[bytes], prefills: Sequence[Replica], now: int) -> list[Plan]:
        """One for each prefill replica."""
        matches = {replica.id: replica.match(keys) for replica in prefills}
        best = max(matches.values())
        holder = min(replica for replica, match in matches.items() if match == best)
        plans = []
        for one in prefills:
            replica, local = one.id, matches[one.id]
            fetch = self._threshold is not None and best > self._threshold * local
            uncached = num_uncached_tokens(request, best if fetch else local, self._block_size)
            takes_ns = prefill_ns(one.cost or self._cost, uncached, request.num_prompt_tokens - uncached)
            transfer_ns = self._transfer.transfer_ns(best - local) if fetch else 0
            queue_ns = self._backlogs[replica].left_ns(now) if replica in self._backlogs else 0
            plans.append(Plan(transfer_ns + queue_ns + takes_ns, takes_ns, replica, holder if fetch else None))
        return plans

    def _choose(self, plans: Sequence[Plan]) -> Plan:
        return min(plans, key=lambda plan: (plan.ttft_ns, plan.replica))

    def _load_ns(self, request: Request, replica: Replica) -> int:
        """A step there with all that are assigned to it, this one included."""
        blocks = self._promised.at(replica) + num_blocks(request.num_prompt_tokens, self._block_size)
        running = max(self._promised.count(replica.id), replica.num_running)
        return decode_ns(replica.cost or self._cost, running + 1, blocks * self._block_size)

    def _misses(self, request: Request, plan: Plan, decode: int, cost: CostModel, now: int) -> bool:
        """Whether one of its objectives would be missed."""
        if self._reject == "never":
            return False
        ttft_ns, tbt_ns = self._ttft_ns, self._tbt_ns
        if request.slo is not None:
            ttft_ns, tbt_ns = (request.slo.ttft_ns, request.slo.tpot_ns) if request.slo.droppable else (None, None)
        if ttft_ns is not None and plan.ttft_ns > ttft_ns:
            return True
        return tbt_ns is not None and self._tbt(request, decode, cost, now, plan.ttft_ns) > tbt_ns

    def _tbt(self, request: Request, decode: int, cost: CostModel, now: int, ttft_ns: int) -> int:
        """A decode step of a replica with this request among those that decode there, now or then."""
        there = [sent for sent in self._sent.values() if sent.decode == decode]
        if self._reject == "now":
            decoding = [sent.request for sent in there if sent.request.first_token_ns is not None]
        else:
            decoding = [sent.request for sent in there if sent.decodes_at(now + ttft_ns, self._decode_ns)]
        context = request.num_prompt_tokens + sum(other.num_tokens for other in decoding)
        return decode_ns(cost, len(decoding) + 1, context)

    def _send(self, request: Request, sent: Sent, takes_ns: int) -> None:
        self._forget(request)  # should it be routed anew without having ended
        self._sent[request.id] = sent
        self._backlogs.setdefault(sent.prefill, Backlog()).add(request, takes_ns)
        self._promised.send(request, sent.decode, num_blocks(request.num_prompt_tokens, self._block_size))
