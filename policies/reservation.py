"""A ledger of memory promised for whole sequences: what admission by reservation has in common."""

from __future__ import annotations

from policies.contract import does_nothing
from policies.draft import Draft
from policies.plan import Mode, Report
from policies.request import Request


class Reservation:
    """Let a request in only if what is promised to everybody admitted, it included, fits the KV memory.

    A rule says how many tokens `most` a request may come to; the ledger keeps them in blocks from admission to release,
    whether they are filled or not. A paused request keeps its promise; one that the draft preempts does not. Shared
    prefixes are not counted on. O(preempted).

    `reserved_blocks` is what contiguous allocation would have set aside by now. The share of it that holds real tokens
    is the sum of `num_computed_tokens` of those that hold a promise, over `reserved_blocks * block_size`. Blocks are
    still allocated one by one as tokens come: a reservation is bookkeeping that limits who gets in.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._promised: dict[int, int] = {}
        self._total = 0
        self._draft: Draft | None = None
        self._num_counted = 0  # of the admissions in that draft
        self._planned = 0  # what they may need

    def most(self, request: Request) -> int:
        """Tokens, prompt included, that a request is promised memory for."""
        raise NotImplementedError

    @property
    def reserved_blocks(self) -> int:
        """Blocks promised to those that hold memory."""
        return self._total

    def allows(self, request: Request, first_blocks: int, all_blocks: int, draft: Draft) -> bool:
        if request.id in self._promised:  # it was paused, and kept its promise as it kept its blocks
            return True
        if draft is not self._draft:
            self._draft, self._num_counted, self._planned = draft, 0, 0
        for other in draft.admitted[self._num_counted :]:
            if other.id not in self._promised:
                self._planned += self._blocks(other)
        self._num_counted = len(draft.admitted)
        given_back = sum(self._promised.get(r.id, 0) for r, mode in draft.plan.preempt if mode is not Mode.KEEP)
        return self._total - given_back + self._planned + self._blocks(request) <= draft.view.num_blocks

    def on_admit(self, request: Request) -> None:
        if request.id not in self._promised:
            self._promised[request.id] = self._blocks(request)
            self._total += self._promised[request.id]

    def on_release(self, request: Request) -> None:
        self._total -= self._promised.pop(request.id, 0)

    @does_nothing
    def on_report(self, report: Report) -> None:
        """What ran changes no promise."""

    def _blocks(self, request: Request) -> int:
        return -(-self.most(request) // self._block_size)
