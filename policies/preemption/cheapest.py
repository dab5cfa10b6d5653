from __future__ import annotations

from policies.contract import View
from policies.costing import prefill_ns
from policies.draft import Draft
from policies.registry import register
from policies.request import Request
from policies.victims import RankedVictim


@register("preemption", "cheapest")
class Cheapest(RankedVictim):
    """Preempt whoever costs the least for each block freed, by the cost model.

    cost = time to compute the context again in one step of its own / blocks that preempting frees. What the prefix
    cache will still hold then is not counted on. Longer contexts share a step's fixed cost among more blocks, but their
    attention grows with the square: the choice depends on the model and the card. A request that frees nothing goes
    last. Swapping to host memory, the other half of the question, needs a host tier, which there is not yet.
    O(blocks held by the running) a victim. Needs a cost model.
    Source: Kwon et al., SOSP 2023, section 7.3, compares recomputation and swapping by context length.
    Who was admitted first is spared (`policies.victims`).
    """

    needs_cost = True
    spares_eldest = True

    def rank(self, request: Request, view: View, draft: Draft, now: int) -> tuple[int, float]:
        assert view.cost is not None
        freed = draft.blocks_freed_by(request)
        if not freed:
            return (0, 0.0)
        return (1, -prefill_ns(view.cost, request.num_tokens) / freed)
