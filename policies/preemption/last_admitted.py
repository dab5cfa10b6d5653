from __future__ import annotations

from policies.contract import View
from policies.draft import Draft
from policies.plan import Mode
from policies.registry import register
from policies.request import Request
from policies.victims import Taking


@register("preemption", "last_admitted")
class LastAdmitted(Taking):
    """Preempt whoever was admitted last: first in, last out (vLLM v1, Sarathi-Serve, Vidur).

    By recomputation its blocks are freed; prompt and output so far are computed again when it is admitted next, less
    what is still found in the prefix cache. The longest-running request always gets on, so this cannot livelock.
    Cost: O(running) a victim.
    """

    def victim(self, view: View, draft: Draft, now: int) -> tuple[Request, Mode] | None:
        for request in reversed(list(view.running.values())):
            if request.id not in draft.preempted:
                return request, self.mode_for(request, view, draft)
        return None
