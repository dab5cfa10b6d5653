"""The paged KV cache: fixed-size blocks of keys and values, addressed by slot (Kwon et al., SOSP 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.model_config import ModelConfig


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values together."""
    return 2 * config.num_layers * block_size * config.kv_size * dtype.itemsize


def num_blocks_that_fit(num_bytes: int, config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """How many blocks a `PagedKVCache` of at most `num_bytes` bytes can have; 0 when not even one fits."""
    return max(0, num_bytes // bytes_per_block(config, block_size, dtype) - 1)  # one more is the scratch block


class PagedKVCache:
    """Keys and values of every layer in `num_blocks` blocks of `block_size` tokens.

    Memory starts at zero, since attention may read the unused tail of a block under a mask, and a mask does
    not silence a NaN. One scratch block follows the last: rows whose slot is -1 land there (index -1 is the
    last slot), which keeps writing free of branches and of host round trips.

    Raises ValueError when `num_blocks` or `block_size` is not positive.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if num_blocks <= 0 or block_size <= 0:
            raise ValueError(
                f"a KV cache of {num_blocks} blocks of {block_size} tokens holds nothing; give it more memory"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.dtype = dtype
        shape = (config.num_layers, 2, num_blocks + 1, block_size, config.num_kv_heads, config.head_dim)
        storage = torch.zeros(shape, dtype=dtype, device=device)
        self.device = storage.device
        # [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]; 2 is key, value
        self.blocks = storage[:, :, :num_blocks]
        # Views are made once: a step makes num_layers * 2 of them otherwise.
        self._layers = [(layer[0], layer[1]) for layer in self.blocks]
        self._slots = [(layer[0].flatten(0, 1), layer[1].flatten(0, 1)) for layer in storage]

    def key(self, layer: int) -> Tensor:
        """Keys of a layer, [num_blocks, block_size, num_kv_heads, head_dim]."""
        return self._layers[layer][0]

    def value(self, layer: int) -> Tensor:
        """Values of a layer, [num_blocks, block_size, num_kv_heads, head_dim]."""
        return self._layers[layer][1]

    def slots(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer by slot, [(num_blocks + 1) * block_size, num_kv_heads, head_dim] each."""
        return self._slots[layer]
