from __future__ import annotations

from collections.abc import Mapping

from policies.registry import register
from policies.request import Request


@register("predictor", "oracle")
class Oracle:
    """The true output length, which a real system cannot know: clairvoyant."""

    clairvoyant = True

    def __init__(self, oracle: Mapping[int, int] | None = None) -> None:
        if oracle is None:
            raise ValueError(
                "predictor=oracle needs output lengths known beforehand, as a trace has; use declared here"
            )
        self._output_tokens = oracle

    def predict(self, request: Request) -> float:
        return self._output_tokens[request.id]

    def on_end(self, request: Request, num_output_tokens: int) -> None:
        """It knew."""
