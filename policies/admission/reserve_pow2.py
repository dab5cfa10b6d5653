from __future__ import annotations

import math
from collections.abc import Mapping

from policies import registry
from policies.plan import Report
from policies.registry import register
from policies.request import Request
from policies.reservation import Reservation


@register("admission", "reserve_pow2")
class ReservePow2(Reservation):
    """Let a request in only if prompts and outputs, these rounded up to a power of two, of everybody admitted fit.

    Tokens reserved: prompt + min(cap, 2^ceil(log2(output))); a true output of 25 reserves 32.
    Source: "Orca (Pow2)" of Kwon et al., SOSP 2023, section 6.1: space for outputs over-reserved at most twofold. It is
    assumed there that the system knows how much that is, so the default `predictor=oracle` is clairvoyant and nobody is
    preempted. Another predictor (`declared`, `quantile`, ...) makes it a rule that a real system can follow; whoever
    outgrows what was predicted takes blocks that nobody promised it, and somebody may be preempted. An output that is
    there already (after a preemption) is never reserved for less than one token more. O(1) and a prediction.
    """

    def __init__(
        self, block_size: int, predictor: str = "oracle", oracle: Mapping[int, int] | None = None, seed: int = 0
    ) -> None:
        super().__init__(block_size)
        self._predictor = registry.make_inner("predictor", predictor, oracle=oracle, seed=seed)
        self.clairvoyant = registry.is_clairvoyant(self._predictor)

    def most(self, request: Request) -> int:
        output = max(math.ceil(self._predictor.predict(request)), request.num_output_tokens + 1)
        return request.num_prompt_tokens + min(request.max_tokens, self._rounded(output))

    def on_report(self, report: Report) -> None:
        for request, _, num_output_tokens in report.finished:
            self._predictor.on_end(request, num_output_tokens)

    def _rounded(self, output: int) -> int:
        return 1 << (output - 1).bit_length()
