"""Token id prompts for a workload that runs on a real model.

Three kinds of content, by what is at hand:

- with a tokenizer, real English: the sentences of `prompts.txt` in an order of the request's own;
- shared prefix blocks: each hash id gives the same tokens in every request, run and process;
- without a tokenizer, random ids, for models with random weights.

Prompts are made to begin differently unless they share hash ids: a request's own text, and each shared block,
opens with a few words drawn from a 64-bit hash. So a prefix cache finds what the workload says is shared and
nothing else. All hashes are blake2b and SHAKE-128: nothing depends on Python's hash seed or NumPy's version.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b, shake_128
from pathlib import Path

import numpy as np

from experiments.workloads.block_keys import block_keys
from experiments.workloads.request import Workload

Encode = Callable[[str], list[int]]

__all__ = ["block_keys", "bundled_prompts", "measure_texts", "prompt_token_ids"]

_OPENING_BITS = 64


def prompt_token_ids(workload: Workload, encode: Encode | None, vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids of each prompt: list i has exactly `prompt_tokens[i]` ids in [0, vocab_size).

    A request with a text of its own gets `encode(text)`, cut or continued to its length. Otherwise hash ids
    give its shared blocks, whatever the seed, and the rest is its own by (seed, request). Without `encode`
    all ids are random.

    Raises:
        ValueError: a vocabulary below 2, texts without a tokenizer, or a tokenizer whose ids do not fit.
    """
    if vocab_size < 2:
        raise ValueError(f"vocab_size is {vocab_size}; it must be at least 2")
    if workload.texts is not None and encode is None:
        raise ValueError(f"{workload.name} has real texts: give encode, a tokenizer, to make token ids of them")
    source = _RandomIds(vocab_size) if encode is None else _Sentences(encode, vocab_size)
    return [_prompt(workload, request, source, seed) for request in range(len(workload))]


def measure_texts(workload: Workload, encode: Encode) -> Workload:
    """The workload with `prompt_tokens` as this tokenizer counts its texts; hash_ids, if any, are dropped.

    Raises:
        ValueError: no texts, or one that encodes to nothing.
    """
    if workload.texts is None:
        raise ValueError(f"{workload.name} has no texts to measure")
    counts = [len(encode(text)) for text in workload.texts]
    if 0 in counts:
        raise ValueError(f"the text of request {counts.index(0)} has no tokens; leave empty prompts out")
    return workload.replace(prompt_tokens=counts, hash_ids=None, hash_block=0).note("measure_texts")


@lru_cache(maxsize=1)
def bundled_prompts() -> tuple[str, ...]:
    """The project's own prompts, one a line."""
    lines = Path(__file__).with_name("prompts.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if line.strip())


def _prompt(workload: Workload, request: int, source: _RandomIds | _Sentences, seed: int) -> list[int]:
    length = int(workload.prompt_tokens[request])
    ids: list[int] = []
    if workload.texts is not None and isinstance(source, _Sentences):
        ids = source.encode(workload.texts[request])[:length]
    elif workload.hash_ids is not None:
        for block in workload.hash_ids[request]:
            ids += source.shared(block, workload.hash_block)
    if len(ids) < length:
        ids += source.tokens(f"own {seed} {request}", length - len(ids))
    return ids[:length]


class _RandomIds:
    """Ids drawn uniformly from the vocabulary by a hash of what they are for."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.shared = lru_cache(maxsize=8192)(self._shared)

    def _shared(self, block: int, length: int) -> list[int]:
        return self.tokens(f"block {block}", length)

    def tokens(self, purpose: str, length: int) -> list[int]:
        """`length` ids, always the same for one purpose; a longer list begins with a shorter one."""
        drawn = np.frombuffer(shake_128(purpose.encode()).digest(8 * length), "<u8")
        return (drawn % self.vocab_size).tolist()


class _Sentences:
    """The bundled prompts, encoded once, in an order drawn by a hash of what they are for."""

    def __init__(self, encode: Encode, vocab_size: int) -> None:
        self._encode, self._vocab_size = encode, vocab_size
        self._prompts = [self.encode(text + "\n") for text in bundled_prompts()]
        # The words that open a text: ids the tokenizer really uses, so never a special token.
        self._words = sorted({token for prompt in self._prompts for token in prompt})
        if len(self._words) < 2:
            raise ValueError("the tokenizer gives fewer than 2 different ids for the bundled prompts")
        self._opening = math.ceil(_OPENING_BITS / math.log2(len(self._words)))
        self.shared = lru_cache(maxsize=8192)(self._shared)

    def encode(self, text: str) -> list[int]:
        """Checked ids of a text."""
        ids = list(self._encode(text))
        if ids and not 0 <= min(ids) <= max(ids) < self._vocab_size:
            raise ValueError(
                f"the tokenizer gives id {max(ids)}, the vocabulary has {self._vocab_size}; use the model's"
            )
        return ids

    def _shared(self, block: int, length: int) -> list[int]:
        return self.tokens(f"block {block}", length)

    def tokens(self, purpose: str, length: int) -> list[int]:
        """`length` ids, always the same for one purpose; a longer list begins with a shorter one."""
        state = int.from_bytes(blake2b(purpose.encode(), digest_size=8).digest(), "little")
        ids: list[int] = []
        for _ in range(self._opening):
            state, word = divmod(state, len(self._words))
            ids.append(self._words[word])
        order = shake_128(purpose.encode())
        turn = 0
        while len(ids) < length:
            turn += 1
            picks = np.frombuffer(order.digest(8 * 16 * turn), "<u8")[-16:] % len(self._prompts)
            for pick in picks.tolist():
                ids += self._prompts[pick]
        return ids[:length]
