"""The paged KV cache: sizes, writing, and rows that must not be written."""

from __future__ import annotations

import pytest
import torch

from runtime.kv_cache import PagedKVCache, bytes_per_block, num_blocks_that_fit
from runtime.model_config import ModelConfig

TINY = ModelConfig.preset("tiny")


def test_a_llama_8b_token_takes_131072_bytes() -> None:
    config = ModelConfig.preset("llama-3.1-8b")
    assert bytes_per_block(config, 1, torch.bfloat16) == 131072
    assert bytes_per_block(config, 16, torch.float32) == 2 * 16 * 131072


@pytest.mark.parametrize("extra", [0, 1, 12345])
def test_a_cache_of_the_blocks_that_fit_takes_no_more_than_it_was_given(extra: int) -> None:
    budget = 10 * bytes_per_block(TINY, 16, torch.float32) + extra
    num_blocks = num_blocks_that_fit(budget, TINY, 16, torch.float32)
    cache = PagedKVCache(TINY, num_blocks, 16, dtype=torch.float32, device="cpu")
    taken = cache.blocks.untyped_storage().nbytes()
    assert taken <= budget < taken + bytes_per_block(TINY, 16, torch.float32)


def test_no_block_fits_in_too_little_memory() -> None:
    assert num_blocks_that_fit(100, TINY, 16, torch.float32) == 0


def test_writing_fills_the_slots_and_nothing_else() -> None:
    cache = PagedKVCache(TINY, 3, 4, dtype=torch.float32, device="cpu")
    key = torch.randn(4, TINY.num_kv_heads, TINY.head_dim)
    value = torch.randn_like(key)
    for slots, new in zip(cache.slots(1), (key, value), strict=True):
        slots[torch.tensor([5, -1, 11, -1])] = new
    expected = torch.zeros_like(cache.blocks)
    expected[1, 0, 1, 1], expected[1, 1, 1, 1] = key[0], value[0]
    expected[1, 0, 2, 3], expected[1, 1, 2, 3] = key[2], value[2]
    assert torch.equal(cache.blocks, expected)
    assert torch.equal(cache.key(1), expected[1, 0])
    assert torch.equal(cache.value(1), expected[1, 1])


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0), (-1, 16)])
def test_a_cache_that_holds_nothing_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="give it more memory"):
        PagedKVCache(TINY, num_blocks, block_size, dtype=torch.float32, device="cpu")
