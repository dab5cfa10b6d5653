"""The registry of attention backends, and the reference against attention written out."""

from __future__ import annotations

import math

import pytest
import torch

from runtime import attention
from runtime.attention import backend_names, get_backend, register_backend
from runtime.attention.sdpa import SdpaBackend
from runtime.forward import ForwardInputs
from runtime.kv_cache import PagedKVCache
from runtime.model_config import ModelConfig


def test_an_unknown_backend_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"unknown attention backend 'flash9'; known: auto, .*sdpa"):
        get_backend("flash9", "cpu")


def test_auto_is_the_reference_on_a_cpu_also_where_tritons_interpreter_could_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert get_backend("auto", "cpu").name == "sdpa"


def test_the_reference_is_asked_last() -> None:
    assert backend_names()[-1] == "sdpa"


def test_a_registered_backend_is_chosen_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(SdpaBackend):
        name = "other"

    def why_unusable(device: torch.device) -> str | None:
        return None if device.type == "cuda" else "it needs a CUDA device"

    monkeypatch.setattr(attention, "_entries", {"sdpa": attention._entries["sdpa"]})
    register_backend("other", Other, why_unusable)
    assert backend_names() == ["other", "sdpa"]
    assert get_backend("auto", "cuda").name == "other"
    assert get_backend("auto", "cpu").name == "sdpa"
    with pytest.raises(ValueError, match="'other' cannot run on cpu: it needs a CUDA device"):
        get_backend("other", "cpu")
    with pytest.raises(ValueError, match="already registered"):
        register_backend("other", Other, why_unusable)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (9, 3), (4, 1)])
def test_sdpa_equals_attention_written_out(heads: int, kv_heads: int) -> None:
    config = ModelConfig(
        hidden_size=8, intermediate_size=8, num_layers=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=8,
        vocab_size=8, max_model_len=64,
    )  # fmt: skip
    torch.manual_seed(heads)
    cache = PagedKVCache(config, 12, 4, dtype=torch.float32, device="cpu")
    cache.blocks.normal_()
    query_lens, seq_lens = [3, 1, 5, 1, 1], [9, 13, 5, 1, 6]
    table = torch.tensor([[7, 0, 11, 99], [3, 8, 1, 6], [5, 2, 99, 99], [4, 99, 99, 99], [9, 10, 99, 99]])
    query = torch.randn(sum(query_lens), heads, 8)
    unread = torch.zeros(0, dtype=torch.int64)
    inputs = ForwardInputs(
        unread, unread, unread, unread, unread, table.int(), query_lens, seq_lens
    )  # fmt: skip
    backend = SdpaBackend()
    out = backend.attend(query, 0, cache, backend.prepare(inputs, cache))

    row = 0
    for seq, (n, length) in enumerate(zip(query_lens, seq_lens, strict=True)):
        keys = torch.cat([cache.key(0)[b] for b in table[seq, : math.ceil(length / 4)]])
        values = torch.cat([cache.value(0)[b] for b in table[seq, : math.ceil(length / 4)]])
        for i in range(n):
            seen = length - n + i + 1
            for head in range(heads):
                kv_head = head * kv_heads // heads
                scores = keys[:seen, kv_head] @ query[row, head] / math.sqrt(8)
                expected = scores.softmax(0) @ values[:seen, kv_head]
                torch.testing.assert_close(out[row, head], expected, atol=1e-5, rtol=1e-5)
            row += 1
