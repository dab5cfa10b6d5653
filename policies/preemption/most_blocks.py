from __future__ import annotations

from policies.contract import View
from policies.draft import Draft
from policies.registry import register
from policies.request import Request
from policies.victims import RankedVictim


@register("preemption", "most_blocks")
class MostBlocks(RankedVictim):
    """Preempt whoever frees the most blocks, shared ones not counted: the fewest victims for a step's need.

    Blocks that others hold too stay where they are, so a long request in a shared prefix may free little. Only those
    are looked at that hold more blocks than the best found frees.
    Who was admitted first is spared (`policies.victims`).
    """

    spares_eldest = True

    def rank(self, request: Request, view: View, draft: Draft, now: int) -> int:
        return draft.blocks_freed_by(request)

    def ceiling(self, request: Request, view: View, draft: Draft, now: int) -> int:
        return request.num_blocks
