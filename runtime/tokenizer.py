"""Text to tokens and back, over the `tokenizers` package: from a tokenizer.json or from GGUF metadata."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from runtime.model_config import ModelError

# GGUF's token types, from llama.cpp.
_CONTROL, _USER_DEFINED = 3, 4


class Tokenizer:
    """A model's tokenizer, its chat template and the tokens that end its answers.

    `chat_template` is Jinja text or None; `eos_token_ids` end a generation; `bos_token`, `eos_token` are for
    templates.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        eos_token_ids: Sequence[int] = (),
        bos_token: str = "",
        eos_token: str = "",
        add_bos: bool = False,
        chat_template: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_token_ids = tuple(eos_token_ids)
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.chat_template = chat_template
        self._prefix = [_id_of(backend, bos_token)] if add_bos else []
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._byte_level = _is_byte_level(backend)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json, with tokenizer_config.json, generation_config.json and config.json beside it.

        Raises ModelError when tokenizer.json is missing or cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise ModelError(f"{path} cannot be read ({error}); fetch it again") from error
        settings = _read_json(folder / "tokenizer_config.json")
        template_file = folder / "chat_template.jinja"
        template = settings.get("chat_template")
        if template_file.is_file():
            template = template_file.read_text(encoding="utf-8")
        eos_token = _token_text(settings.get("eos_token"))
        return cls(
            backend,
            eos_token_ids=_eos_ids(folder, backend, eos_token),
            bos_token=_token_text(settings.get("bos_token")),
            eos_token=eos_token,
            chat_template=template if isinstance(template, str) else None,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build a byte-level BPE tokenizer from GGUF metadata.

        Raises ModelError for another kind of tokenizer or an unknown pre-tokenizer.
        """
        kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
        if kind != "gpt2" or pre != "smollm":
            raise ModelError(
                f"GGUF tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported; known: 'gpt2' with"
                " 'smollm' (use the model's safetensors files)"
            )
        tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
        # "smollm": every digit by itself, then GPT-2's split.
        digits, byte_level = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        backend.decoder = decoders.ByteLevel()
        for token, token_type in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
            if token_type in (_CONTROL, _USER_DEFINED):
                backend.add_tokens([AddedToken(token, special=token_type == _CONTROL, normalized=False)])
        bos, eos = metadata.get("tokenizer.ggml.bos_token_id"), metadata.get("tokenizer.ggml.eos_token_id")
        return cls(
            backend,
            eos_token_ids=() if eos is None else (eos,),
            bos_token="" if bos is None else tokens[bos],
            eos_token="" if eos is None else tokens[eos],
            add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)) and bos is not None,
            chat_template=metadata.get("tokenizer.chat_template"),
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included; the model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. The text of a special token becomes that token; bytes for which the vocabulary has
        no token are dropped (for SmolLM2, a few control characters).

        `add_special_tokens` puts those in front that the model expects (none for SmolLM2). Text from
        `apply_chat_template` has its own: encode it without.
        """
        ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return [*self._prefix, *ids] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no valid UTF-8 come out as U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def id_to_bytes(self, token_id: int) -> bytes:
        """The exact bytes one token adds to the text; a special token gives its name's.

        Raises ValueError for an id outside the vocabulary.
        """
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size} tokens")
        if self._byte_level:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        single = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
        return bytes([int(single[1], 16)]) if single else token.replace("▁", " ").encode()

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens."""
        return frozenset(token_id for token_id, token in self._added.items() if self.is_special(token_id))

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token, left out of the text by `decode`."""
        token = self._backend.get_added_tokens_decoder().get(token_id)
        return token is not None and token.special

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Text of a conversation ({"role": ..., "content": ...} each), ready for `encode` without special
        tokens.

        The template comes with the model, so it runs in a sandbox. Raises ModelError when the model has no
        template, and ValueError when the template refuses the messages.
        """
        if self.chat_template is None:
            raise ModelError("this model has no chat template; send plain text, or use an instruction-tuned model")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        try:
            return environment.from_string(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes are themselves, the others U+0100 onwards, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _is_byte_level(backend: Backend) -> bool:
    """Whether tokens are in GPT-2's byte alphabet; otherwise U+2581 is a space and <0x..> a byte."""
    decoder = json.dumps(json.loads(backend.to_str()).get("decoder"))
    if '"ByteLevel"' in decoder:
        return True
    if '"ByteFallback"' in decoder:
        return False
    raise ModelError("this tokenizer is neither byte-level nor has byte fallback; use a model with one of these")


def _id_of(backend: Backend, token: str) -> int:
    token_id = backend.token_to_id(token)
    if token_id is None:
        raise ModelError(f"the tokenizer has no token {token!r}; fetch the model again")
    return token_id


def _token_text(value: Any) -> str:
    """tokenizer_config.json has special tokens as text or as {"content": text, ...}."""
    if isinstance(value, Mapping):
        return str(value.get("content", ""))
    return value if isinstance(value, str) else ""


def _eos_ids(folder: Path, backend: Backend, eos_token: str) -> tuple[int, ...]:
    """From generation_config.json (Llama 3 ends at several), else config.json, else the tokenizer."""
    for name in ("generation_config.json", "config.json"):
        eos = _read_json(folder / name).get("eos_token_id")
        if eos is not None:
            return (eos,) if isinstance(eos, int) else tuple(eos)
    token_id = backend.token_to_id(eos_token) if eos_token else None
    return () if token_id is None else (token_id,)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); fetch it again") from error
    return content if isinstance(content, dict) else {}


def bytes_of_tokens(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """The bytes of a token id, looked up once each. Ids beyond the tokenizer's, which pad an embedding, have none."""

    @functools.cache
    def token_bytes(token_id: int) -> bytes:
        try:
            return tokenizer.id_to_bytes(token_id)
        except ValueError:
            return b""

    return token_bytes
