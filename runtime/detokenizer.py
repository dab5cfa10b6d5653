"""Tokens to text as they come: whole characters only, and nothing that may yet turn out to be a stop string.

Two stages, each with the least state that gives the one-shot answer. Bytes to characters: an incremental
UTF-8 decoder keeps an unfinished character's bytes; bytes that cannot be UTF-8 become U+FFFD exactly as
`bytes.decode(errors="replace")` of the whole would have it. Characters to text: the longest end of the text
that begins some stop string is held back until it is one or cannot be.

The stop string that counts is the one whose last character comes first; of several that end there, the
longest. That does not depend on where tokens or deltas begin and end.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence

from runtime.sampling.params import SamplingParams


class IncrementalDetokenizer:
    """The text of one request's output, delta by delta.

    The deltas of all `push` and the final `flush`, joined, are the text of the whole: the tokens' bytes
    decoded, special tokens left out if `params.skip_special_tokens`, cut at the stop string (before it, or
    after it if `params.include_stop_str_in_output`). A stop string does not count if it ends within the
    first `params.min_tokens` tokens' text.

    Args:
        id_to_bytes: the bytes of a token id.
        special_ids: the ids of special tokens.
        params: the request's.
    """

    def __init__(
        self, id_to_bytes: Callable[[int], bytes], special_ids: Collection[int], params: SamplingParams
    ) -> None:
        self.finished_by: str | None = None
        """The stop string that ended the text, once one has."""
        self.num_tokens = 0
        """Tokens taken so far; after a stop string, up to the token that completed it."""
        self._id_to_bytes = id_to_bytes
        self._skipped = frozenset(special_ids) if params.skip_special_tokens else frozenset[int]()
        self._params = params
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._flushed = False

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes output tokens and returns the text that is now certain.

        After a stop string everything is ignored and the delta is empty: a step in flight when the request
        ended may still bring a token.

        Raises:
            RuntimeError: after `flush`.
        """
        if self._flushed:
            raise RuntimeError("push was called after flush: the text has ended")
        deltas = []
        for token_id in token_ids:
            if self.finished_by is not None:
                break
            self.num_tokens += 1
            if token_id not in self._skipped:
                deltas.append(self._release(self._decoder.decode(self._id_to_bytes(token_id))))
        return "".join(deltas)

    def flush(self) -> str:
        """Ends the text and returns what was held back; an unfinished character becomes U+FFFD."""
        if self._flushed or self.finished_by is not None:
            self._flushed = True
            return ""
        self._flushed = True
        delta = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return delta + rest

    def _release(self, new: str) -> str:
        """Adds new characters and returns what no stop string can take away any more."""
        stops = self._params.stop
        if not stops or not new:
            return new
        text = self._held + new
        if self.num_tokens > self._params.min_tokens:
            match = _first_match(text, len(self._held), stops)
            if match is not None:
                start, self.finished_by = match
                self._held = ""
                end = start + len(self.finished_by)
                return text[: end if self._params.include_stop_str_in_output else start]
        held = _longest_beginning(text, stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _first_match(text: str, seen: int, stops: Sequence[str]) -> tuple[int, str] | None:
    """The stop string that ends first, if one ends after `seen` characters: where it begins, and which."""
    best: tuple[int, int, str] | None = None
    for stop in stops:
        start = text.find(stop, max(0, seen - len(stop) + 1))
        if start >= 0:
            found = (start + len(stop), start, stop)
            best = found if best is None else min(best, found)
    return None if best is None else best[1:]


def _longest_beginning(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of the text that begins a stop string without being all of it."""
    longest = 0
    for stop in stops:
        for length in range(min(len(text), len(stop) - 1), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
