from __future__ import annotations

from policies.registry import register
from policies.request import Request


@register("predictor", "declared")
class Declared:
    """What the client declared (hint `output_tokens`), else its cap; at least 1 and never above the cap."""

    def predict(self, request: Request) -> float:
        return max(1.0, min(float(request.max_tokens), request.hints.get("output_tokens", request.max_tokens)))

    def on_end(self, request: Request, num_output_tokens: int) -> None:
        """What others needed says nothing here."""
