from __future__ import annotations

from policies.draft import Draft
from policies.plan import Report
from policies.registry import register
from policies.request import Request


@register("admission", "reserve_max")
class ReserveMax:
    """Let a request in only if prompt and cap of everybody admitted, it included, fit: nobody is ever preempted.

    Keeps a ledger of the blocks that each running request may need in the end. Shared prefixes are not
    counted on. O(1).
    Source: the reservation of FasterTransformer and of Orca (Yu et al., OSDI 2022), in blocks.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._promised: dict[int, int] = {}
        self._total = 0
        self._draft: Draft | None = None
        self._num_counted = 0  # of the admissions in that draft
        self._planned = 0  # what they may need

    def allows(self, request: Request, first_blocks: int, all_blocks: int, draft: Draft) -> bool:
        if request.id in self._promised:  # it was paused, and kept its promise as it kept its blocks
            return True
        if draft is not self._draft:
            self._draft, self._num_counted, self._planned = draft, 0, 0
        for other in draft.admitted[self._num_counted :]:
            if other.id not in self._promised:
                self._planned += self._most(other)
        self._num_counted = len(draft.admitted)
        return self._total + self._planned + self._most(request) <= draft.view.num_blocks

    def on_admit(self, request: Request) -> None:
        self._promised[request.id] = self._most(request)
        self._total += self._promised[request.id]

    def on_release(self, request: Request) -> None:
        self._total -= self._promised.pop(request.id, 0)

    def on_report(self, report: Report) -> None:
        """What ran changes no promise."""

    def _most(self, request: Request) -> int:
        return -(-(request.num_prompt_tokens + request.max_tokens) // self._block_size)
