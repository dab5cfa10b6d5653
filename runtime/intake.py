"""From what a caller hands in to a request that the engine can run: checked, with an id and a stamp."""

from __future__ import annotations

import operator
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

from policies.replica_state import Limits
from policies.request import Request
from runtime.detokenizer import IncrementalDetokenizer
from runtime.sampling.batch import sampling_key
from runtime.sampling.params import SamplingParams
from runtime.sequence import Details, Output, Sequence
from runtime.tokenizer import bytes_of_tokens
from runtime.weights import LoadedModel


@dataclass(frozen=True, slots=True)
class Entry:
    """A request that has been checked and is not stamped yet. `request_id`: None for the next one."""

    token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    on_output: Callable[[Output], None]
    details: Details
    detokenizer: IncrementalDetokenizer | None
    request_id: int | None = None


class Intake:
    """Knows what a model can serve. `sequence` counts the ids and is one thread's at a time; the rest may be any's.

    Args:
        seed: of the random draws of requests without a seed of their own.
        ids_in_any_order: the caller's ids need not become larger; that they differ is his business.
    """

    def __init__(self, loaded: LoadedModel, limits: Limits, seed: int, ids_in_any_order: bool = False) -> None:
        self._loaded = loaded
        self._limits = limits
        self._seed = seed
        self._any_order = ids_in_any_order
        self._next_id = 0
        tokenizer = loaded.tokenizer
        if tokenizer is not None:
            self._token_bytes = bytes_of_tokens(tokenizer)
            self._special_ids = tokenizer.special_ids

    def encode(self, prompt: str | SequenceOf[int]) -> list[int]:
        """Token ids of a prompt. Raises ValueError for one that has none, or others than the model's."""
        loaded = self._loaded
        if isinstance(prompt, str):
            if loaded.tokenizer is None:
                raise ValueError(f"{loaded.name} has no tokenizer; give token ids instead of text")
            return loaded.tokenizer.encode(prompt)
        try:
            token_ids = [operator.index(token_id) for token_id in prompt]
        except TypeError:
            raise ValueError(f"a prompt is text or a list of token ids, not {prompt!r:.60}") from None
        vocab = loaded.config.vocab_size
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab:
            bad = next(t for t in token_ids if not 0 <= t < vocab)
            raise ValueError(f"token id {bad} is outside the vocabulary of {vocab}")
        return token_ids

    def check(
        self, token_ids: list[int], params: SamplingParams, on_output: Callable[[Output], None], details: Details
    ) -> Entry:
        """A request as it is handed in. Raises ValueError for what this model cannot serve."""
        params.check_vocab(self._loaded.config.vocab_size)
        detokenizer = self._detokenizer(params, details)
        max_tokens = params.max_tokens
        if max_tokens is not None:
            max_tokens = min(max_tokens, 2**31 - 1)  # as wide as the record's column, and more than any model's limit
        else:
            max_tokens = max(1, self._limits.max_total_tokens - len(token_ids))
        return Entry(token_ids, params, max_tokens, on_output, details, detokenizer)

    def _detokenizer(self, params: SamplingParams, details: Details) -> IncrementalDetokenizer | None:
        if self._loaded.tokenizer is None:
            if params.stop:
                raise ValueError(f"{self._loaded.name} has no tokenizer, so it cannot look for stop strings")
            return None
        if details.forced_length is not None:
            params = replace(params, stop=())
        return IncrementalDetokenizer(self._token_bytes, self._special_ids, params)

    def sequence(self, entry: Entry, now: int) -> Sequence:
        """The request, arrived at `now` (ns). Raises ValueError for an id that is not above all before, where
        that is asked for."""
        details = entry.details
        request_id = self._next_id if entry.request_id is None else entry.request_id
        if request_id < self._next_id and not self._any_order:
            raise ValueError(f"request id {request_id} is not above the last one, {self._next_id - 1}")
        self._next_id = max(self._next_id, request_id + 1)
        request = Request(
            request_id,
            now,
            len(entry.token_ids),
            entry.max_tokens,
            tenant=details.tenant,
            session=details.session,
            program=details.program,
            parents=details.parents,
            priority=details.priority,
            slo=details.slo,
            hints=details.hints,
        )
        k = details.continuation
        key = sampling_key(self._seed, request.id - k, entry.params, k)
        return Sequence(
            request, entry.token_ids, entry.params, key, entry.on_output, entry.detokenizer, details.forced_length
        )
