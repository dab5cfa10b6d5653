from __future__ import annotations

from collections.abc import Mapping

from policies.admission.reserve_pow2 import ReservePow2
from policies.registry import register


@register("admission", "reserve_oracle")
class ReserveOracle(ReservePow2):
    """Let a request in only if the true final lengths of everybody admitted, it included, fit. Clairvoyant.

    Tokens reserved: prompt + output, which is the least that lets each run to its end whatever the others do.
    `predictor` is `oracle`; with another one this reserves what that predicts, without a margin.
    Source: "Orca (Oracle)" of Kwon et al., SOSP 2023, section 6.1. O(1).
    """

    def __init__(
        self, block_size: int, predictor: str = "oracle", oracle: Mapping[int, int] | None = None, seed: int = 0
    ) -> None:
        super().__init__(block_size, predictor, oracle, seed)

    def _rounded(self, output: int) -> int:
        return output
