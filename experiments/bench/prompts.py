"""The content of the requests: prompts of the workload's lengths, as token ids or as text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.bench.spec import BenchSpec
from experiments.spec import SpecError
from experiments.workloads import Workload, prompt_token_ids
from experiments.workloads.text import Encode, bundled_prompts
from runtime.client import APIStatusError, Client
from runtime.openai_wire import STREAMED
from runtime.tokenizer import Tokenizer

Decode = Callable[[list[int]], str]
Prompt = str | list[int]
Prompts = Sequence[Prompt]

_ANY_VOCABULARY = 2**31
"""Where the ids are the server's own, it knows best which there are."""


def make_prompts(workload: Workload, spec: BenchSpec, client: Client) -> tuple[Prompts, str]:
    """One prompt a request, and what they are made of, in words.

    Token ids are those that `diptych run` gives the same workload, if the tokenizer is the same. Text is the workload's
    own where it has some, else those ids decoded, which a server may encode to a few tokens more or less; its usage
    says. Raises SpecError where there is nothing to make token ids with, ValueError for a tokenizer that does not fit.
    """
    if spec.prompts == "text" and workload.texts is not None:
        return workload.texts, "the workload's own texts"
    if spec.vocab_size is not None:
        return prompt_token_ids(workload, None, spec.vocab_size, spec.seed), f"random token ids below {spec.vocab_size}"
    encode, decode, vocab_size, origin = _tokenizer(spec, client)
    ids = prompt_token_ids(workload, encode, vocab_size, spec.seed)
    return (ids, f"token ids by {origin}") if spec.prompts == "ids" else ([decode(i) for i in ids], f"text by {origin}")


def _tokenizer(spec: BenchSpec, client: Client) -> tuple[Encode, Decode, int, str]:
    """Encode, decode, how many ids there are, and whose they are."""
    if spec.tokenizer is not None:
        local = Tokenizer.from_folder(Path(spec.tokenizer))
        return local.encode, local.decode, local.vocab_size, spec.tokenizer
    try:
        client.tokenize("a", model=spec.model)
    except APIStatusError as error:
        if spec.prompts == "ids":
            raise SpecError(
                f"the server makes no token ids of text (/tokenize: {error}); give --tokenizer FOLDER, or --vocab-size "
                "N for random ids, or send --prompts text"
            ) from error
        words = _Words()
        return words.encode, words.decode, len(words), "words: as many words as the workload has tokens"
    return (
        lambda text: client.tokenize(text, model=spec.model),
        lambda ids: client.detokenize(ids, model=spec.model),
        _ANY_VOCABULARY,
        "the server's tokenizer",
    )


class _Words:
    """Words for tokens, where neither side tells its tokenizer. English has about 1.3 tokens a word."""

    def __init__(self) -> None:
        self._words = sorted({word for text in bundled_prompts() for word in text.split()})
        self._ids = {word: i for i, word in enumerate(self._words)}

    def __len__(self) -> int:
        return len(self._words)

    def encode(self, text: str) -> list[int]:
        """Ids of the words of a bundled prompt."""
        return [self._ids[word] for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        """The words."""
        return " ".join(self._words[i] for i in ids)


def cap_of(workload: Workload, spec: BenchSpec, i: int) -> int:
    """The cap that request i asks for, in tokens."""
    return int((workload.output_tokens if spec.ignore_eos else workload.max_tokens)[i])


def make_headers(workload: Workload, i: int) -> dict[str, str]:
    """The headers of request i beside its id: its tenant, as `diptych serve` takes it."""
    return {} if workload.tenant is None else {"x-tenant": workload.tenant[i]}


def make_body(workload: Workload, spec: BenchSpec, prompts: Prompts, i: int) -> bytes:
    """The body of request i, with the fields that `vllm bench serve` sends."""
    body: dict[str, Any] = {"model": spec.model}
    if spec.api == "chat":
        body["messages"] = [{"role": "user", "content": prompts[i]}]
        body["max_completion_tokens"] = cap_of(workload, spec, i)
    else:
        body["prompt"] = prompts[i]
        body["max_tokens"] = cap_of(workload, spec, i)
    body |= STREAMED
    if spec.ignore_eos:
        body["ignore_eos"] = True
    if spec.temperature is not None:
        body["temperature"] = spec.temperature
    if workload.tenant is not None:
        body["user"] = workload.tenant[i]
    if workload.priority is not None:
        body["priority"] = int(workload.priority[i])
    return json.dumps(body | spec.extra_body).encode()
