from __future__ import annotations

from policies.registry import register
from policies.request import Request
from policies.reservation import Reservation


@register("admission", "reserve_max")
class ReserveMax(Reservation):
    """Let a request in only if prompt and cap of everybody admitted, it included, fit: nobody is ever preempted.

    Keeps a ledger of the blocks that each running request may need in the end (`policies.reservation`). Shared prefixes
    are not counted on. O(1).
    Source: the reservation of FasterTransformer and of Orca (Yu et al., OSDI 2022), in blocks; "Orca (Max)" of Kwon et
    al., SOSP 2023, section 6.1, which reserves the model's limit where we reserve the request's own cap.
    """

    def most(self, request: Request) -> int:
        return request.num_prompt_tokens + request.max_tokens
