"""What a caller may ask of sampling. The ranges are those of vLLM's `SamplingParams`."""

from __future__ import annotations

import math
from dataclasses import dataclass

GREEDY_BELOW = 1e-5
"""A temperature under this is greedy: dividing logits by less would overflow float32."""


class InvalidSamplingParams(ValueError):
    """A sampling parameter is out of range; the message names the field and the value."""


_MOST = 2**31 - 1
"""More tokens than any model has or makes, and what arrays of them hold."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled and when it ends.

    Raises:
        InvalidSamplingParams: on any value out of range, of the wrong type, NaN or infinite.
    """

    n: int = 1
    """How many independent continuations of the prompt, at least 1; 1 if greedy."""
    temperature: float = 1.0
    """In [0, 2]. 0 (or under 1e-5) is greedy: the most probable token, always."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 or -1 keeps all. Tokens that tie with the k-th are kept too."""
    top_p: float = 1.0
    """In (0, 1]: keep the fewest most probable tokens whose mass reaches top_p."""
    min_p: float = 0.0
    """In [0, 1]: keep tokens at least min_p times as probable as the most probable one."""
    repetition_penalty: float = 1.0
    """Over 0. Divides positive and multiplies negative logits of tokens seen in the prompt or the output."""
    presence_penalty: float = 0.0
    """In [-2, 2]. Taken from the logit of each token seen in the output."""
    frequency_penalty: float = 0.0
    """In [-2, 2]. Taken from the logit once for each time the token was seen in the output."""
    seed: int | None = None
    """A 64-bit integer that alone fixes the draws; None: by the engine's seed and the request id."""
    max_tokens: int | None = 16
    """At least 1; None leaves the context length as the only limit."""
    min_tokens: int = 0
    """In [0, max_tokens]: up to it no stop token can be sampled and no stop string matches."""
    stop: tuple[str, ...] = ()
    """Strings that end the output."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the output, besides the model's end-of-sequence tokens."""
    ignore_eos: bool = False
    """Go on past end-of-sequence tokens."""
    logprobs: int | None = None
    """How many most probable tokens to report besides the sampled one; -1 is the whole vocabulary."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the stop token's text, at the end of the text."""

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1)
        _check_real("temperature", self.temperature, 0.0, 2.0)
        _check_int("top_k", self.top_k, -1, _MOST)
        _check_real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_real("min_p", self.min_p, 0.0, 1.0)
        _check_real("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _check_real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1)
        _check_int("min_tokens", self.min_tokens, 0, _MOST)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, -1)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidSamplingParams(f"{name} must be true or false, got {getattr(self, name)!r}")
        _check_stops(self.stop, self.stop_token_ids)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidSamplingParams(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )
        if self.greedy and self.n > 1:
            raise InvalidSamplingParams(f"n must be 1 when temperature is 0 (all would be the same), got {self.n}")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken instead of a random one."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        """Whether any of the three penalties changes a logit."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def check_vocab(self, vocab_size: int) -> None:
        """Raises InvalidSamplingParams if a stop token or the number of logprobs exceeds the vocabulary."""
        for token in self.stop_token_ids:
            if token >= vocab_size:
                raise InvalidSamplingParams(
                    f"stop_token_ids must be below the vocabulary size {vocab_size}, got {token}"
                )
        if self.logprobs is not None and self.logprobs > vocab_size:
            raise InvalidSamplingParams(
                f"logprobs must be at most the vocabulary size {vocab_size}, got {self.logprobs}"
            )


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidSamplingParams(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise InvalidSamplingParams(f"{name} must be {wanted}, got {value}")


def _check_real(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise InvalidSamplingParams(f"{name} must be a finite number, got {value!r}")
    if value < low or value > high or (open_low and value == low):
        if math.isinf(high):
            wanted = f"over {low:g}"
        else:
            wanted = f"in {'(' if open_low else '['}{low:g}, {high:g}]"
        raise InvalidSamplingParams(f"{name} must be {wanted}, got {value}")


def _check_stops(stop: object, stop_token_ids: object) -> None:
    if not isinstance(stop, tuple) or not all(isinstance(s, str) for s in stop):
        raise InvalidSamplingParams(f"stop must be a tuple of strings, got {stop!r}")
    if "" in stop:
        raise InvalidSamplingParams(f"stop must hold no empty string, got {stop!r}")
    if not isinstance(stop_token_ids, tuple):
        raise InvalidSamplingParams(f"stop_token_ids must be a tuple of integers, got {stop_token_ids!r}")
    for token in stop_token_ids:
        _check_int("stop_token_ids", token, 0)
