from __future__ import annotations

from policies.key_queue import KeyQueue
from policies.registry import register
from policies.request import Request


@register("queue", "fcfs")
class Fcfs(KeyQueue):
    """First come, first served.

    A preempted request is again ahead of everybody who arrived later, which is where vLLM puts it too (the head of the
    queue): whoever was admitted before it under this order arrived before it.
    """

    def rank(self, request: Request) -> float:
        return 0.0
