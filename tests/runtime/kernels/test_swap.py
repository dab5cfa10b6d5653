"""The kernel that packs KV blocks and unpacks them, against PyTorch's indexing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from runtime.kernels.swap import move_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("words", [8, 1024, 1500])
def test_blocks_are_packed_one_after_another_and_put_back_where_they_are_wanted(words: int) -> None:
    generator = torch.Generator().manual_seed(words)
    # The caches' last block is left out of the view, as the scratch block is: pieces do not follow each other.
    storage = torch.randint(-(2**60), 2**60, (6, 9, words), generator=generator).to(DEVICE)
    cache, before = storage[:, :8], storage.clone()
    ids, others = (torch.tensor(ids, dtype=torch.int32, device=DEVICE) for ids in ([5, 0, 7], [1, 6, 2]))
    packed = torch.zeros(3, 6, words, dtype=torch.int64, device=DEVICE)
    move_blocks[(3, 6)](cache, packed, ids, cache.stride(0), words, GATHER=True, BLOCK=1024)
    assert torch.equal(packed, before[:, [5, 0, 7]].transpose(0, 1))
    assert torch.equal(storage, before)
    move_blocks[(3, 6)](cache, packed, others, cache.stride(0), words, GATHER=False, BLOCK=1024)
    before[:, [1, 6, 2]] = before[:, [5, 0, 7]]
    assert torch.equal(storage, before)
