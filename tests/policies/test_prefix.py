"""Keys of KV blocks: a key stands for a block's tokens and everything before them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.prefix import KEY_BYTES, block_keys, chain_key, root_key

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@given(TOKENS, st.integers(1, 8))
def test_there_is_one_key_for_each_full_block(tokens: list[int], size: int) -> None:
    keys = block_keys(tokens, size)
    assert len(keys) == len(tokens) // size
    assert all(len(key) == KEY_BYTES for key in keys)
    assert len(set(keys)) == len(keys)


@given(TOKENS, st.integers(1, 8), st.integers(0, 40))
def test_a_chain_continued_in_chunks_is_the_same_chain(tokens: list[int], size: int, cut: int) -> None:
    whole = block_keys(tokens, size)
    blocks = min(cut, len(whole))
    head = block_keys(tokens[: blocks * size], size)
    tail = block_keys(tokens[blocks * size :], size, head[-1] if head else None)
    assert head + tail == whole


@given(TOKENS.filter(bool), st.integers(1, 8), st.data())
def test_another_token_changes_the_key_of_its_block_and_of_all_behind_it(
    tokens: list[int], size: int, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = [*tokens]
    other[at] = (tokens[at] + 1) % 2**32
    for depth, (a, b) in enumerate(zip(block_keys(tokens, size), block_keys(other, size), strict=True)):
        assert (a == b) is (depth < at // size)


def test_the_same_block_behind_another_parent_has_another_key() -> None:
    assert chain_key(root_key(), [1, 2]) != chain_key(chain_key(root_key(), [1, 2]), [1, 2])
    assert block_keys([1, 1, 1, 1], 2)[0] != block_keys([1, 1, 1, 1], 2)[1]


def test_another_salt_shares_no_key() -> None:
    tokens = list(range(16))
    chains = [block_keys(tokens, 4, root_key(salt)) for salt in (b"", b"tenant a", b"tenant b")]
    assert len({key for chain in chains for key in chain}) == 12
    assert block_keys(tokens, 4, root_key()) == chains[0]


def test_keys_are_the_same_in_every_process() -> None:
    assert root_key().hex() == "bbaa2d999db98ec6eb8ec6f238c1d8c3"
    assert block_keys([1, 2, 3, 4], 4)[0].hex() == "d47d61a489bf559a2824c04027df3444"


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_id_beyond_32_bits_is_an_error(token: int) -> None:
    with pytest.raises(OverflowError):
        block_keys([token], 1)
