"""What offload policies share: how long a copy in host memory is kept, and whether it is worth fetching."""

from __future__ import annotations

from policies.block_pool import CachedBlock
from policies.contract import CostModel
from policies.costing import prefill_ns
from policies.shapes import StepShape

_REMEMBERED = 4096


class Offloading:
    """Answers no to everything else: a policy says which of its three occasions to keep a block it takes.

    `ttl_s`: copies that nobody has used for so long are forgotten; none: they stay until the memory is needed.
    `fetch`: `cheaper`: blocks are fetched where the cost model says that this is quicker than to compute them again in
    a step that runs anyway, and always where there is no cost model; `always`. `ahead`: those of a request that waits
    for a slot or for tokens are fetched while it waits.
    """

    def __init__(self, ttl_s: float | None = None, fetch: str = "cheaper", ahead: bool = False) -> None:
        if ttl_s is not None and ttl_s <= 0:
            raise ValueError(f"ttl_s must be above 0, not {ttl_s}")
        if fetch not in ("cheaper", "always"):
            raise ValueError(f"fetch must be cheaper or always, not {fetch!r}")
        self._ttl_ns = None if ttl_s is None else round(ttl_s * 1e9)
        self._fetch = fetch
        self._ahead = ahead
        self._answers: dict[tuple[int, int, int], bool] = {}

    def on_fill(self, block: CachedBlock, now: int) -> bool:
        return False

    def on_hit(self, block: CachedBlock, now: int) -> bool:
        return False

    def on_evict(self, block: CachedBlock, now: int) -> bool:
        return False

    def keeps_since(self, now: int) -> int | None:
        return None if self._ttl_ns is None else now - self._ttl_ns

    def fetches_ahead(self) -> bool:
        return self._ahead

    def fetches(self, start: int, num_tokens: int, cost: CostModel | None) -> bool:
        if cost is None or self._fetch == "always":
            return True
        asked = (start, num_tokens, getattr(cost, "reading_ns", 0))
        answer = self._answers.get(asked)
        if answer is None:
            if len(self._answers) >= _REMEMBERED:
                self._answers.clear()
            answer = self._answers[asked] = self._is_cheaper(start, num_tokens, cost)
        return answer

    def _is_cheaper(self, start: int, num_tokens: int, cost: CostModel) -> bool:
        """One token is computed in any case."""
        copying = cost.step_ns(StepShape(swapped_in=num_tokens)) - cost.step_ns(StepShape())
        computing = prefill_ns(cost, num_tokens + 1, start) - prefill_ns(cost, 1, start + num_tokens)
        return copying < computing
