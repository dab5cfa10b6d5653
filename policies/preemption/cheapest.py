from __future__ import annotations

from policies.contract import View
from policies.draft import Draft
from policies.registry import register
from policies.request import Request
from policies.victims import RankedVictim


@register("preemption", "cheapest")
class Cheapest(RankedVictim):
    """Preempt whoever costs the least for each block freed, by recomputation or swapping, whichever is cheaper for it.

    cost = min(recompute, swap) / blocks that preempting frees, by the cost model. recompute: the time to compute the
    context again in one step of its own, what the prefix cache will still hold then not counted on; its attention grows
    with the square of the context. swap, where the host has room: copying the blocks that the context fills there and
    back, which grows with their number. So the choice depends on the model, the card and its link. A request that frees
    nothing goes last.
    What is freed is counted only of those who would cost less than the best found if they shared no block: of one or
    two where few blocks are shared, of all at worst. Needs a cost model.
    Who was admitted first is spared (`policies.victims`).
    Source: Kwon et al., SOSP 2023, section 7.3, compares recomputation and swapping by block size and context length.
    """

    spares_eldest = True

    def __init__(self) -> None:
        super().__init__("cheapest")

    def rank(self, request: Request, view: View, draft: Draft, now: int) -> tuple[int, float]:
        freed = draft.blocks_freed_by(request)
        if not freed:
            return (0, 0.0)
        return (1, -min(self.costs(request, view, draft)) / freed)

    def ceiling(self, request: Request, view: View, draft: Draft, now: int) -> tuple[int, float]:
        """As if it freed all of its blocks, and the host had room."""
        if not request.num_blocks:
            return (0, 0.0)
        return (1, -min(self.prices(request, view)) / request.num_blocks)
