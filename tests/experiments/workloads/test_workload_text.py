"""Real tokens and block keys: what is shared is exactly what the workload says is shared."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.workloads import Workload, WorkloadSpec, block_keys, make_workload, measure_texts, prompt_token_ids
from experiments.workloads.text import bundled_prompts

VOCAB = 1000


def encode(text: str) -> list[int]:
    """A real, if simple, tokenizer: bytes."""
    return list(text.encode())


def workload(prompts: list[int], **columns: object) -> Workload:
    return Workload.build([0] * len(prompts), prompts, [1] * len(prompts), **columns)


@st.composite
def shared(draw: st.DrawFn) -> Workload:
    """A workload whose ids come from a small pool, so that prefixes are shared often."""
    hash_block = draw(st.integers(1, 24))
    prompts = draw(st.lists(st.integers(1, 120), min_size=2, max_size=6))
    ids = [tuple(draw(st.lists(st.integers(0, 2), max_size=-(-prompt // hash_block)))) for prompt in prompts]
    return workload(prompts, hash_ids=ids, hash_block=hash_block)


def common(left: list[int], right: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


@settings(max_examples=200, deadline=None)
@given(shared(), st.integers(1, 40))
def test_keys_agree_exactly_where_blocks_and_all_before_them_agree(load: Workload, block_size: int) -> None:
    assert load.hash_ids is not None
    keys = list(block_keys(load, block_size))
    prompts = load.prompt_tokens.tolist()
    assert [len(row) for row in keys] == [tokens // block_size for tokens in prompts]
    for one in range(len(load)):
        for two in range(one + 1, len(load)):
            agreed = common(list(load.hash_ids[one]), list(load.hash_ids[two])) * load.hash_block
            equal = [a == b for a, b in zip(keys[one], keys[two], strict=False)]
            expected = [(i + 1) * block_size <= agreed for i in range(len(equal))]
            assert equal == expected
    flat = [key for row in keys for key in set(row)]
    assert all(len(key) == 16 for key in flat)
    assert all(len(set(row)) == len(row) for row in keys)  # no key comes twice in one request


def test_requests_without_ids_share_no_key() -> None:
    keys = list(block_keys(workload([64, 64, 70]), 16))
    assert [len(row) for row in keys] == [4, 4, 4]
    assert len({key for row in keys for key in row}) == 12


def test_generated_blocks_have_keys_of_their_own_behind_the_prompts() -> None:
    load = Workload.build([0, 0], [40, 48], [30, 1], hash_ids=[(1, 2), (1, 2, 3)], hash_block=16)
    keys = list(block_keys(load, 16, generated=True))
    assert [len(row) for row in keys] == [70 // 16, 49 // 16]
    assert [row[: t // 16] for row, t in zip(keys, (40, 48), strict=True)] == list(block_keys(load, 16))
    assert keys[0][:2] == keys[1][:2]
    assert len({*keys[0], *keys[1]}) == 5


def test_a_block_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size is 0"):
        block_keys(workload([4]), 0)


@settings(max_examples=100, deadline=None)
@given(shared(), st.sampled_from([None, encode]))
def test_tokens_agree_at_least_where_keys_agree(load: Workload, tokenizer: object) -> None:
    ids = prompt_token_ids(load, tokenizer, VOCAB, seed=5)  # type: ignore[arg-type]
    assert [len(row) for row in ids] == load.prompt_tokens.tolist()
    assert all(0 <= token < VOCAB for row in ids for token in row)
    keys = list(block_keys(load, 4))
    for one in range(len(load)):
        for two in range(one):
            same = sum(a == b for a, b in zip(keys[one], keys[two], strict=False)) * 4
            assert ids[one][:same] == ids[two][:same]


@pytest.mark.parametrize("tokenizer", [None, encode])
def test_tokens_share_no_more_prefix_than_the_workload_says(tokenizer: object) -> None:
    load = make_workload(WorkloadSpec(name="prefix-chat", n=60)).scale_lengths(1 / 8)
    assert load.hash_ids is not None
    ids = prompt_token_ids(load, tokenizer, VOCAB, seed=0)  # type: ignore[arg-type]
    for one, two in pairwise(range(len(load))):
        said = common(list(load.hash_ids[one]), list(load.hash_ids[two])) * load.hash_block
        found = common(ids[one], ids[two])
        assert min(said, len(ids[one]), len(ids[two])) <= found < said + 11  # 11 words of 64 bits in all differ


@pytest.mark.parametrize("tokenizer", [None, encode])
def test_requests_of_their_own_do_not_begin_alike(tokenizer: object) -> None:
    ids = prompt_token_ids(workload([40] * 500), tokenizer, VOCAB, seed=0)  # type: ignore[arg-type]
    assert len({tuple(row[:16]) for row in ids}) == 500


def test_the_seed_changes_own_text_but_never_a_shared_block() -> None:
    load = workload([40, 40], hash_ids=[(3, 4), (3,)], hash_block=16)
    for tokenizer in (None, encode):
        one, two = (prompt_token_ids(load, tokenizer, VOCAB, seed) for seed in (1, 2))
        assert one == prompt_token_ids(load, tokenizer, VOCAB, 1)
        assert one[0][:32] == two[0][:32]
        assert one[0][32:] != two[0][32:]
        assert one[0][:16] == one[1][:16]
        assert one[0][16:] != one[1][16:]


def test_a_longer_prompt_begins_with_a_shorter_one() -> None:
    for tokenizer in (None, encode):
        short, long = (prompt_token_ids(workload([size]), tokenizer, VOCAB, 0)[0] for size in (30, 3000))
        assert long[:30] == short


def test_tokens_and_keys_are_the_same_in_every_process() -> None:
    code = (
        "from experiments.workloads import *;"
        "w = make_workload(WorkloadSpec(name='prefix-chat', n=3)).scale_lengths(1 / 64);"
        "e = lambda t: list(t.encode());"
        "print(prompt_token_ids(w, e, 256, 0), prompt_token_ids(w, None, 256, 0), list(block_keys(w, 16)))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert len(outputs.pop()) > 1000


def test_text_made_for_a_tokenizer_is_the_bundled_english() -> None:
    text = bytes(prompt_token_ids(workload([2000]), encode, VOCAB, 0)[0]).decode()
    assert sum(prompt in text for prompt in bundled_prompts()) >= 5


def test_the_bundled_prompts_are_many_and_different() -> None:
    prompts = bundled_prompts()
    assert len(prompts) >= 40
    assert len(set(prompts)) == len(prompts)


def test_texts_of_a_workload_are_used_and_cut_or_continued_to_length() -> None:
    load = workload([5, 30], texts=["hello world", "short"])
    cut, continued = prompt_token_ids(load, encode, VOCAB, 0)
    assert cut == encode("hello")
    assert continued[:5] == encode("short")
    assert len(continued) == 30
    assert measure_texts(load, encode).prompt_tokens.tolist() == [11, 5]


@pytest.mark.parametrize(
    ("load", "tokenizer", "vocab", "message"),
    [
        (workload([5], texts=["hello"]), None, VOCAB, "give encode"),
        (workload([5]), encode, 50, "the tokenizer gives id"),
        (workload([5]), None, 1, "vocab_size is 1"),
        (workload([5]), lambda text: [7] * len(text), VOCAB, "fewer than 2 different ids"),
    ],
)
def test_what_cannot_make_tokens_is_refused(load: Workload, tokenizer: object, vocab: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_token_ids(load, tokenizer, vocab, 0)  # type: ignore[arg-type]


def test_an_empty_text_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="the text of request 0 has no tokens"):
        measure_texts(workload([5], texts=[""]), encode)
