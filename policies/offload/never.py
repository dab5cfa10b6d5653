from __future__ import annotations

from policies.offloading import Offloading
from policies.registry import register


@register("offload", "never")
class Never(Offloading):
    """Keep no prefix in host memory: what the device evicts is computed again.

    Host memory, where there is any, is for swapped requests alone. O(1).
    """

    keeps_nothing = True

    def __init__(self) -> None:
        super().__init__()
