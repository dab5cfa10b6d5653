"""Predictions of a request's output length, as objects of their own: policies that need one are handed one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from policies.request import Request


class LengthPredictor(Protocol):
    """Predicts output tokens. `clairvoyant`: it is told what a real system cannot know."""

    clairvoyant: bool

    def predict(self, request: Request) -> float: ...


class Declared:
    """What the client declared (hint `output_tokens`), else its cap."""

    clairvoyant = False

    def predict(self, request: Request) -> float:
        return request.hints.get("output_tokens", request.max_tokens)


class Oracle:
    """The true output lengths, by request id."""

    clairvoyant = True

    def __init__(self, output_tokens: Mapping[int, int]) -> None:
        self._output_tokens = output_tokens

    def predict(self, request: Request) -> float:
        return self._output_tokens[request.id]


def make_predictor(name: str, oracle: Mapping[int, int] | None) -> LengthPredictor:
    """`declared` or `oracle`. Raises ValueError for another name, or for an oracle where the truth is not known."""
    if name == "declared":
        return Declared()
    if name != "oracle":
        raise ValueError(f"predictor must be declared or oracle, not {name!r}")
    if oracle is None:
        raise ValueError("predictor=oracle needs output lengths known beforehand, as a trace has; use declared here")
    return Oracle(oracle)
