"""Names for KV blocks: a chain of hashes, so that a key stands for a block's tokens and all that come before it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

from policies.request import Request, State

if TYPE_CHECKING:
    from policies.contract import View

KEY_BYTES = 16


def root_key(salt: bytes = b"") -> bytes:
    """The parent of every first block. Different salts (tenants, say) never share a block."""
    return blake2b(salt, digest_size=KEY_BYTES, person=b"diptych-prefix").digest()


def chain_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the full block with these token ids behind the block with key `parent`."""
    return blake2b(parent + array("I", tokens).tobytes(), digest_size=KEY_BYTES).digest()


def block_keys(tokens: Sequence[int], block_size: int, parent: bytes | None = None) -> list[bytes]:
    """Keys of the full blocks of `tokens`; a partial last block has none.

    `parent` continues a chain (default: the unsalted root). Token ids are below 2**32.
    """
    key = root_key() if parent is None else parent
    keys = []
    for end in range(block_size, len(tokens) + 1, block_size):
        key = chain_key(key, tokens[end - block_size : end])
        keys.append(key)
    return keys


def hit_tokens(request: Request, view: View) -> int:
    """What a waiting request would find in the prefix cache: of a swapped one not all that comes back with it, of one
    that holds its blocks nothing."""
    if request.num_blocks:
        return 0
    hit = view.probe(request)
    return len(hit.blocks) * view.block_size if request.state is State.SWAPPED else hit.num_tokens
