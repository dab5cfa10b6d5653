"""The tokenizer against transformers' own reading of the same file, and its exact bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from runtime.model_config import ModelError
from runtime.tokenizer import Tokenizer
from runtime.weights import LoadedModel

TEXTS = [
    "",
    " ",
    "Hello, world!  Two spaces,\ttab\r\nand lines\n\n\n",
    "In 2024, 1234567890 people paid $3.50 of €7,00; x = -0.001e12.",
    "def f(x: int) -> str:\n    return f'{x:>08b}'  # don't we'll they're\n",
    "Ça va très bien; naïve façade, Zürich, smörgåsbord, Łódź.",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم.",
    "你好，世界。こんにちは世界。안녕하세요 세계. नमस्ते दुनिया",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\u00a0 zero\u0000byte",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
]


@pytest.fixture(scope="module")
def tokenizer(smollm2: LoadedModel) -> Tokenizer:
    assert smollm2.tokenizer is not None
    return smollm2.tokenizer


@pytest.fixture(scope="module")
def theirs(smollm2: LoadedModel) -> Any:
    path = smollm2.source_path
    assert path is not None
    if path.is_file():
        return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return transformers.AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def known_bytes(tokenizer: Tokenizer) -> set[int]:
    pieces = map(tokenizer.id_to_bytes, range(tokenizer.vocab_size))
    return {piece[0] for piece in pieces if len(piece) == 1}


def test_ids_and_text_equal_those_of_transformers(tokenizer: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == theirs(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_the_bytes_of_single_tokens_make_up_the_text(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert b"".join(map(tokenizer.id_to_bytes, tokenizer.encode(text))) == text.encode()


def test_every_digit_of_any_script_is_a_word_by_itself(tokenizer: Tokenizer) -> None:
    # Not compared with transformers, which drops this rule when it reads a GGUF file.
    for digits in ("2024", "٣٤٥", "²³", "½①"):
        assert tokenizer.encode("x" + digits) == [i for c in "x" + digits for i in tokenizer.encode(c)]


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_round_trip_byte_by_byte(text: str, tokenizer: Tokenizer, known_bytes: set[int]) -> None:
    ids = tokenizer.encode(text)
    # The model's vocabulary has no token for a few bytes, control characters mostly: those are dropped.
    expected = bytes(byte for byte in text.encode() if byte in known_bytes)
    assert b"".join(map(tokenizer.id_to_bytes, ids)) == expected
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected.decode(errors="replace")


def test_every_id_has_bytes_and_no_other_does(tokenizer: Tokenizer, smollm2: LoadedModel) -> None:
    assert tokenizer.vocab_size == smollm2.config.vocab_size == 49152
    assert all(tokenizer.id_to_bytes(i) for i in range(tokenizer.vocab_size))
    with pytest.raises(ValueError, match="token id 49152 is outside the vocabulary of 49152 tokens"):
        tokenizer.id_to_bytes(49152)


def test_answers_end_at_the_end_of_the_turn(tokenizer: Tokenizer) -> None:
    assert [tokenizer.id_to_bytes(i) for i in tokenizer.eos_token_ids] == [b"<|im_end|>"]
    assert tokenizer.is_special(tokenizer.eos_token_ids[0])
    assert not tokenizer.is_special(tokenizer.encode("a")[0])


def test_the_chat_template_equals_that_of_transformers(tokenizer: Tokenizer, theirs: Any) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "What is 2 + 2?"},
    ]
    for chat in (messages, [{"role": "system", "content": "Be brief."}, *messages], messages[:1]):
        for prompt in (True, False):
            expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert tokenizer.apply_chat_template(chat, add_generation_prompt=prompt) == expected


def small_backend(*, byte_fallback: bool = False) -> Backend:
    if byte_fallback:
        tokens = ["<s>", "</s>", "▁", "h", "i", "▁hi", "<0xC3>", "<0xA9>"]
        backend = Backend(models.BPE({t: i for i, t in enumerate(tokens)}, [], byte_fallback=True))
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        backend = Backend(models.BPE({"h": 0, "i": 1, "hi": 2, "Ġ": 3}, [("h", "i")]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def write_folder(folder: Path, **files: Any) -> None:
    small_backend().save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def test_settings_are_read_from_the_files_beside_the_tokenizer(tmp_path: Path) -> None:
    settings = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "chat_template": "{{ bos_token }}x"}
    write_folder(tmp_path, tokenizer_config=settings)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_token_ids == (5,)
    assert tokenizer.apply_chat_template([]) == "<s>x"
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}", encoding="utf-8")
    write_folder(tmp_path, tokenizer_config=settings, generation_config={"eos_token_id": [4, 5]})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_token_ids == (4, 5)
    assert tokenizer.apply_chat_template([]) == "</s>"


def test_byte_fallback_tokens_have_their_bytes() -> None:
    tokenizer = Tokenizer(small_backend(byte_fallback=True))
    assert tokenizer.id_to_bytes(5) == b" hi"
    assert b"".join(map(tokenizer.id_to_bytes, [3, 6, 7])) == "hé".encode()
    assert tokenizer.id_to_bytes(1) == b"</s>"


def test_a_beginning_of_sequence_token_is_added_where_the_model_wants_one() -> None:
    tokenizer = Tokenizer(small_backend(), bos_token="<s>", add_bos=True)
    assert tokenizer.encode("hi") == [4, 2]
    assert tokenizer.encode("hi", add_special_tokens=False) == [2]


def test_a_folder_without_a_readable_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ModelError, match="neither byte-level nor has byte fallback"):
        Tokenizer(Backend(models.WordLevel({"a": 0})))


def test_a_model_without_a_template_cannot_chat() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        Tokenizer(small_backend()).apply_chat_template([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses these messages"),
        ("{% if %}", "refuses these messages"),
    ],
)
def test_a_template_cannot_do_what_the_sandbox_forbids(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer(small_backend(), chat_template=template).apply_chat_template([])
