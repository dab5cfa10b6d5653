"""Log probabilities in the two forms of OpenAI's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.sequence import TokenLogprobs
from runtime.serving.text import TextCodec

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have; vLLM's choice too."""


class CompletionLogprobs:
    """Of one choice of /v1/completions: parallel lists. `text_offset` counts characters of the tokens' own texts."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._offset = 0

    def of(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The lists for the next tokens."""
        text = self._codec.token_text
        tokens = [text(token_id) for token_id in token_ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        tops: list[dict[str, float]] = []
        for one in logprobs:
            top: dict[str, float] = {}
            for token_id, logprob in one.top:
                top.setdefault(text(token_id), max(logprob, LOWEST))  # tokens with one text: the best of them
            tops.append(top)
        return {
            "tokens": tokens,
            "token_logprobs": [max(one.sampled, LOWEST) for one in logprobs],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several parallel lists as one."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [item for part in parts for item in part[name]] for name in names}


def chat_logprobs(
    codec: TextCodec, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> list[dict[str, Any]]:
    """The items of `logprobs.content` of a chat answer."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = codec.token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": max(logprob, LOWEST), "bytes": list(data)}

    return [
        {**entry(token_id, one.sampled), "top_logprobs": [entry(other, logprob) for other, logprob in one.top]}
        for token_id, one in zip(token_ids, logprobs, strict=True)
    ]
