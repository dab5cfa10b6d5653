"""Which attention backends are fastest on this card for this model, by trying them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.attention.base import AttentionBackend
from runtime.attention.split import SplitBackend
from runtime.forward import ForwardInputs
from runtime.kv_cache import PagedKVCache
from runtime.model_config import ModelConfig

_log = logging.getLogger(__name__)

_DECODES = [1024] * 32  # KV lengths; together larger than the card's L2 cache for most models
_CHUNK = 2048  # tokens of one prompt
_CALLS = 8


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a backend's speed depends on: heads of one layer on this device, block size in tokens, type of the cache."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: ModelConfig, block_size: int, dtype: torch.dtype) -> AttentionShape:
        """A model's, over a cache of this block size and type."""
        return cls(config.num_heads, config.num_kv_heads, config.head_dim, block_size, dtype)


@torch.inference_mode()
def fastest(shape: AttentionShape, device: torch.device, candidates: Iterable[AttentionBackend]) -> AttentionBackend:
    """The fastest of the candidates for decodes and the fastest for chunks, as one backend. Needs a CUDA device.

    A layer is timed in a CUDA graph: host time is left out. For decodes a candidate that can be captured comes before
    one that cannot, however fast: a whole step outside of a graph costs more than its attention.

    A candidate that refuses the shape, or cannot be built, is left out. Raises ValueError when all are.
    """
    with torch.cuda.device(device):  # kernels are launched on the current one
        return _fastest(shape, device, candidates)


def _fastest(shape: AttentionShape, device: torch.device, candidates: Iterable[AttentionBackend]) -> AttentionBackend:
    tokens = max(sum(_DECODES), _CHUNK)
    cache = PagedKVCache(
        ModelConfig(
            hidden_size=shape.num_heads * shape.head_dim, intermediate_size=1, num_layers=1, num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, vocab_size=1, max_model_len=_CHUNK,
        ),
        -(-tokens // shape.block_size) + len(_DECODES), shape.block_size, dtype=shape.dtype, device=device,
    )  # fmt: skip
    cache.blocks.normal_()
    decodes = _inputs([1] * len(_DECODES), _DECODES, cache, len(_DECODES))
    chunk = _inputs([_CHUNK], [_CHUNK], cache, 0)
    timed: list[tuple[AttentionBackend, float, float]] = []
    for backend in candidates:
        try:
            times = _milliseconds(backend, decodes, shape, cache), _milliseconds(backend, chunk, shape, cache)
        except Exception as refusal:  # a shape it does not serve, or a compiler that is not there
            _log.warning("attention %s left out: %s", backend.name, refusal)
            continue
        timed.append((backend, *times))
        _log.info("attention %s: %.3f ms for decodes, %.3f ms for a chunk, a layer", backend.name, *times)
    if not timed:
        raise ValueError(f"no attention backend serves {shape}")
    decode = min(timed, key=lambda entry: (not entry[0].capturable, entry[1]))[0]
    prefill = min(timed, key=lambda entry: entry[2])[0]
    return decode if decode is prefill else SplitBackend(prefill, decode)


def _inputs(query_lens: Sequence[int], seq_lens: Sequence[int], cache: PagedKVCache, num_decodes: int) -> ForwardInputs:
    """A step whose sequences have blocks scattered over the cache."""
    device, width = cache.device, -(-max(seq_lens) // cache.block_size)
    order = torch.randperm(len(seq_lens) * width, generator=torch.Generator().manual_seed(0))
    unread = torch.zeros(0, dtype=torch.int64, device=device)
    return ForwardInputs(
        unread,
        unread,
        unread,
        torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32, device=device),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
        order.view(len(seq_lens), width).int().to(device),
        query_lens,
        seq_lens,
        num_decodes,
    )


def _milliseconds(
    backend: AttentionBackend, inputs: ForwardInputs, shape: AttentionShape, cache: PagedKVCache
) -> float:
    """Milliseconds of one layer's attention."""
    rows = sum(inputs.host_query_lens or ())
    query = torch.randn(rows, shape.num_heads, shape.head_dim, device=cache.device).to(shape.dtype)
    plan = backend.prepare(inputs, cache)
    backend.attend(query, 0, cache, plan)  # what is compiled or allocated once, now
    torch.cuda.synchronize(cache.device)
    graph = torch.cuda.CUDAGraph()
    kept: list[Tensor] = []
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            kept.append(backend.attend(query, 0, cache, plan))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(4):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / _CALLS)
    return min(times)
