"""The interface every attention backend has."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from runtime.forward import ForwardInputs
from runtime.kv_cache import PagedKVCache


class AttentionBackend(Protocol):
    """Causal attention of this step's queries over the paged cache, which already holds this step's keys and
    values.

    Query i of the n queries of a sequence with KV length L sees keys 0 .. L - n + i. Query heads share KV
    heads in equal groups (grouped-query attention), in order. Scores are scaled by head_dim ** -0.5.
    """

    name: str
    capturable: bool  # whether a step of decodes alone may be captured in a CUDA graph
    captures_chunks: bool  # whether one with chunks may be

    def prepare(self, inputs: ForwardInputs, kv_cache: PagedKVCache) -> object:
        """What the layers of one step share (indices, masks, launch sizes); `attend` gets it back."""
        ...

    def attend(self, query: Tensor, layer: int, kv_cache: PagedKVCache, plan: object) -> Tensor:
        """query [T, num_heads, head_dim] -> the same shape; what comes out at padded rows means nothing."""
        ...
