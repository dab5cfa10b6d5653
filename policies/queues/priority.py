from __future__ import annotations

from policies.key_queue import KeyQueue
from policies.registry import register
from policies.request import Request


@register("queue", "priority")
class Priority(KeyQueue):
    """Lowest `Request.priority` first, then first come, first served (vLLM's priority policy)."""

    def rank(self, request: Request) -> float:
        return float(request.priority)
