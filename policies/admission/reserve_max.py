from __future__ import annotations

from policies.draft import Draft
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

    def allows(self, request: Request, first_blocks: int, all_blocks: int, draft: Draft) -> bool:
        planned = sum(map(self._most, draft.admitted))
        return self._total + planned + self._most(request) <= draft.view.num_blocks

    def on_admit(self, request: Request) -> None:
        self._promised[request.id] = self._most(request)
        self._total += self._promised[request.id]

    def on_release(self, request: Request) -> None:
        self._total -= self._promised.pop(request.id, 0)

    def _most(self, request: Request) -> int:
        return -(-(request.num_prompt_tokens + request.max_tokens) // self._block_size)
