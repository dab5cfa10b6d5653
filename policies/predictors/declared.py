from __future__ import annotations

from policies.registry import register
from policies.request import Request


@register("predictor", "declared")
class Declared:
    """What the client declared (hint `output_tokens`), else its cap."""

    def predict(self, request: Request) -> float:
        return request.hints.get("output_tokens", request.max_tokens)

    def on_end(self, request: Request, num_output_tokens: int) -> None:
        """What others needed says nothing here."""
