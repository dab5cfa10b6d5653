"""A pair of the Triton attention and the reference against either alone."""

from __future__ import annotations

import pytest
import torch

from runtime.attention.base import AttentionBackend
from runtime.attention.sdpa import SdpaBackend
from runtime.attention.split import SplitBackend
from runtime.attention.triton import TritonBackend
from tests.runtime.kernels.test_attention import CUDA, DECODE, DEVICE, PREFILL, make_cache, make_inputs


def triton() -> AttentionBackend:
    return TritonBackend() if CUDA else TritonBackend(DECODE, PREFILL)


@pytest.mark.parametrize("triton_decodes", [True, False])
@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "num_decodes"),
    [([1, 1, 1], [40, 3, 17], 3), ([20, 5], [20, 30], 0), ([1, 1, 18, 4], [33, 9, 18, 37], 2)],
)
def test_a_pair_equals_the_reference(
    triton_decodes: bool, query_lens: list[int], seq_lens: list[int], num_decodes: int
) -> None:
    torch.manual_seed(num_decodes)
    cache = make_cache(6, 2, 16, 20, 16, torch.float32)
    inputs = make_inputs(query_lens, seq_lens, cache, num_decodes)
    inputs.input_ids = inputs.positions = inputs.slot_mapping = torch.arange(sum(query_lens), device=DEVICE)
    query = torch.randn(sum(query_lens), 6, 16, device=DEVICE)
    reference = SdpaBackend()
    pair = SplitBackend(reference, triton()) if triton_decodes else SplitBackend(triton(), reference)
    assert pair.capturable is triton_decodes
    out = pair.attend(query, 0, cache, pair.prepare(inputs, cache))
    expected = reference.attend(query, 0, cache, reference.prepare(inputs, cache))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
