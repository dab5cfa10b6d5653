"""One request inside the engine: its tokens, its text so far, and who is listening."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from policies.prefix import block_keys
from policies.request import Request
from runtime.detokenizer import IncrementalDetokenizer
from runtime.sampling.params import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "dropped", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one output position: of the sampled token, and of the most probable ones, best first."""

    sampled: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Output:
    """What one step adds to one request. The deltas of a request's outputs, joined, are its text."""

    request_id: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    num_cached_tokens: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """`token_ids` are the prompt's and the output's; `keys` names the full blocks among them, if prefixes are cached."""

    request: Request
    token_ids: list[int]
    params: SamplingParams
    sampling_key: int
    on_output: Callable[[Output], None]
    detokenizer: IncrementalDetokenizer | None
    forced_length: int | None = None
    keys: list[bytes] = field(default_factory=list)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.request.num_prompt_tokens

    def new_keys(self, block_size: int) -> list[bytes]:
        """Names of the blocks that the tokens fill and that have none yet; they are added to `keys`."""
        start = len(self.keys) * block_size
        parent = self.keys[-1] if self.keys else None
        new = block_keys(self.token_ids[start:], block_size, parent)
        self.keys.extend(new)
        return new
