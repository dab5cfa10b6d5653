"""One request inside the engine: what it came with, its tokens, its text so far, and what its client gets to see."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from policies.prefix import block_keys
from policies.request import Request, Slo
from runtime.detokenizer import IncrementalDetokenizer
from runtime.sampling.params import SamplingParams
from runtime.sampling.stop import StopReason, check_stop, text_token_ids

FinishReason = Literal["stop", "length", "cancelled", "dropped", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one output position: of the sampled token, and of the most probable ones, best first."""

    sampled: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Output:
    """What one step adds to one request. The deltas of a request's outputs, joined, are its text.

    `error` says why a request was refused, dropped by a policy, or left when the engine stopped.
    """

    request_id: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished continuation: all its outputs together. `error` says why there is none, or not all of it."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    error: str | None = None


class Collector:
    """Joins the outputs of one request into the completion that `generate` waits for.

    It keeps what they hold and not the outputs: a hundred thousand of these would keep the garbage collector busy.
    """

    def __init__(self, future: Future[Completion], num_prompt_tokens: int) -> None:
        self._future = future
        self._num_prompt_tokens = num_prompt_tokens
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._num_cached_tokens = 0

    def __call__(self, output: Output) -> None:
        if output.text:
            self._text.append(output.text)
        self._token_ids += output.token_ids
        self._logprobs += output.logprobs
        self._num_cached_tokens = max(self._num_cached_tokens, output.num_cached_tokens)
        if output.finish_reason is not None:
            completion = Completion(
                text="".join(self._text),
                token_ids=tuple(self._token_ids),
                logprobs=tuple(self._logprobs),
                finish_reason=output.finish_reason,
                stop_reason=output.stop_reason,
                num_prompt_tokens=self._num_prompt_tokens,
                num_cached_tokens=self._num_cached_tokens,
                error=output.error,
            )
            self._future.set_result(completion)


@dataclass(frozen=True, slots=True)
class Details:
    """What a request carries beside its prompt and its sampling parameters.

    `forced_length`: end after exactly so many output tokens, whatever they are. Policies do not see it; it replays
    a trace's lengths. `continuation` numbers the requests of one call with n > 1. The rest is as in
    `policies.request.Request`.
    """

    tenant: str = ""
    session: int | None = None
    program: int | None = None
    parents: tuple[int, ...] = ()
    priority: int = 0
    slo: Slo | None = None
    hints: dict[str, float] = field(default_factory=dict)
    forced_length: int | None = None
    continuation: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for what a policy could not be told, or the record not keep."""
        if not isinstance(self.tenant, str):
            raise ValueError(f"tenant must be text, not {self.tenant!r}")
        _check_int("priority", self.priority, bits=32)
        for name in ("session", "program"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), bits=64)
        if not isinstance(self.parents, tuple):
            raise ValueError(f"parents must be a tuple of request ids, not {self.parents!r}")
        for parent in self.parents:
            _check_int("a parent", parent, bits=64)
        if self.slo is not None:
            for name in ("ttft_ns", "tpot_ns", "e2e_ns"):
                if getattr(self.slo, name) is not None:
                    _check_int(f"slo.{name}", getattr(self.slo, name), bits=64)
            _check_number("slo.value", self.slo.value)
        for hint, value in self.hints.items():
            if not isinstance(hint, str):
                raise ValueError(f"a hint's name must be text, not {hint!r}")
            _check_number(f"hint {hint}", value)


def _check_int(name: str, value: object, bits: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
        raise ValueError(f"{name} must be a whole number that fits in {bits} bits, not {value!r}")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value!r}")


@dataclass(slots=True, eq=False)
class Sequence:
    """`token_ids` are the prompt's and the output's; `keys` names the full blocks among them, if prefixes are cached.

    With `forced_length` the output ends after exactly so many tokens, whatever they are.
    """

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
        """Output tokens that the host knows; those of a step in flight are not among them."""
        return len(self.token_ids) - self.request.num_prompt_tokens

    def new_keys(self, block_size: int) -> SequenceOf[bytes]:
        """Names of the blocks that the tokens fill and that have none yet; they are added to `keys`."""
        start = len(self.keys) * block_size
        if len(self.token_ids) - start < block_size:
            return ()
        parent = self.keys[-1] if self.keys else None
        new = block_keys(self.token_ids[start:], block_size, parent)
        self.keys.extend(new)
        return new

    def take(self, token_id: int, eos_token_ids: Collection[int], max_model_len: int) -> tuple[str, StopReason | None]:
        """Append a sampled token. Returns the text that is now certain, and why the output ends, if it does."""
        self.token_ids.append(token_id)
        reason = self._stop_reason(token_id, eos_token_ids, max_model_len)
        if self.detokenizer is None:
            return "", reason
        forced = self.forced_length is not None
        text = self.detokenizer.push([token_id] if forced else text_token_ids([token_id], reason, self.params))
        if self.detokenizer.finished_by is not None:
            return text, StopReason("stop", self.detokenizer.finished_by)
        return (text, reason) if reason is None else (text + self.rest_of_text(), reason)

    def rest_of_text(self) -> str:
        """Ends the text: what was held back, since it might have become a stop string or a whole character."""
        return "" if self.detokenizer is None else self.detokenizer.flush()

    def _stop_reason(self, token_id: int, eos_token_ids: Collection[int], max_model_len: int) -> StopReason | None:
        request, count, forced = self.request, self.num_output_tokens, self.forced_length
        if forced is None:
            found = check_stop(token_id, count, request.num_prompt_tokens, self.params, eos_token_ids, max_model_len)
            if found is not None:
                return found
        # The cap that the policies know, which is the client's or less.
        if count >= request.max_tokens:
            return StopReason("length")
        return StopReason("stop") if forced is not None and count >= forced else None
