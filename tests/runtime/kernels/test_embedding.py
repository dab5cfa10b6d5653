"""A rank's part of the embeddings: the kernel against PyTorch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from runtime.ops.fused import FusedOps
from runtime.ops.reference import ReferenceOps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("hidden", "dtype"), [(64, torch.float32), (576, torch.bfloat16), (2500, torch.float16)])
def test_parts_of_the_vocabulary_add_up_to_the_embedding_of_every_token(hidden: int, dtype: torch.dtype) -> None:
    table = torch.randn(50, hidden, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    ids = torch.tensor([0, 49, 19, 20, 39, 40, 20], device=DEVICE)
    parts = []
    for start, stop in ((0, 20), (20, 40), (40, 50)):
        own = torch.full((20, hidden), torch.nan, dtype=dtype, device=DEVICE)  # rows that nobody's tokens have
        own[: stop - start] = table[start:stop]
        parts.append(FusedOps().embed_part(ids, own, start, stop - start))
        assert torch.equal(parts[-1], ReferenceOps().embed_part(ids, own, start, stop - start))
    assert torch.equal(sum(parts), table[ids])


def test_no_tokens_have_no_embeddings() -> None:
    table = torch.ones(4, 64, device=DEVICE)
    assert FusedOps().embed_part(torch.empty(0, dtype=torch.int64, device=DEVICE), table, 0, 4).shape == (0, 64)
