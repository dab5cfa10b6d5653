"""Text and tokens at the front: the model's tokenizer with what serving needs around it."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.detokenizer import IncrementalDetokenizer
from runtime.model_config import ModelError
from runtime.sampling.params import SamplingParams
from runtime.serving.errors import ApiError
from runtime.tokenizer import Tokenizer, bytes_of_tokens

INLINE_CHARACTERS = 4_096
"""Texts up to this long are tokenised at once; longer ones in a thread, so that nobody else's stream waits for them."""


class TextCodec:
    """Turns prompts into token ids and output tokens into text.

    `tokenizer` is None for a model without one: such a model takes token ids, and its outputs have no text.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, model: str) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._model = model
        self._special = frozenset[int]() if tokenizer is None else tokenizer.special_ids
        self.token_bytes = bytes_of_tokens(tokenizer) if tokenizer is not None else lambda token_id: b""
        """The bytes that a token adds to the text; none for ids beyond the tokenizer's."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ApiError where there is none."""
        if self._tokenizer is None:
            raise ApiError(400, f"{self._model} has no tokenizer: send token ids, and no stop strings")
        return self._tokenizer

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises ApiError for a model without tokenizer."""
        encode = self.tokenizer.encode
        if len(text) <= INLINE_CHARACTERS:
            return encode(text, add_special_tokens)
        return await asyncio.to_thread(encode, text, add_special_tokens)

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation. Raises ApiError where the model has no template, or its template refuses it."""
        apply = functools.partial(self.tokenizer.apply_chat_template, messages, add_generation_prompt)
        size = sum(len(str(message.get("content", ""))) for message in messages)
        try:
            text = apply() if size <= INLINE_CHARACTERS else await asyncio.to_thread(apply)
        except (ModelError, ValueError) as error:
            raise ApiError(400, str(error), "messages") from None
        return await self.encode(text, add_special_tokens=False)

    def check(self, token_ids: Sequence[int], field: str) -> list[int]:
        """Token ids that a client sent. Raises ApiError for one that the model does not have."""
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            bad = next(t for t in token_ids if not 0 <= t < self._vocab_size)
            raise ApiError(400, f"{field}: token id {bad} is outside the vocabulary of {self._vocab_size}", field)
        return list(token_ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids. Raises ApiError for a model without tokenizer."""
        return self.tokenizer.decode(token_ids, skip_special_tokens)

    def detokenizer(self, params: SamplingParams) -> IncrementalDetokenizer:
        """For one output. Raises ApiError where stop strings are asked of a model without text."""
        if params.stop:
            _ = self.tokenizer
        return IncrementalDetokenizer(self.token_bytes, self._special, params)

    def token_text(self, token_id: int) -> str:
        """A single token as text; bytes that are no whole character come out as U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")
