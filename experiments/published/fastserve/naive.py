"""FastServe's baseline."""

from __future__ import annotations

from policies.draft import Draft
from policies.queues.mlfq import Mlfq


class Naive(Mlfq):
    """A multi-level feedback queue in which everybody joins the top, whatever the prompt takes."""

    def begin(self, draft: Draft, now: int) -> None:
        super().begin(draft, now)
        self._cost = None
