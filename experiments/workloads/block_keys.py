"""Keys of prefix blocks for when there are no real tokens, as in the simulator."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b, shake_128

from experiments.workloads.request import Workload

KEY_BYTES = 16


def block_keys(workload: Workload, block_size: int, *, generated: bool = False) -> Iterator[list[bytes]]:
    """For each request in turn, one 16-byte key for each full block of `block_size` prompt tokens.

    Key i stands for the content of block i AND everything before it: two requests have the same key i if and
    only if their prompts agree, as far as `hash_ids` tell, up to the end of block i. Any `block_size` works,
    whether it divides `hash_block` or not. Blocks that reach past a request's hash_ids, and all blocks of a
    workload without them, have keys of their own (by request number): nobody else can hit them, but the request
    itself can, after a preemption. `generated`: keys for the blocks that its output will fill, too; they are its own.

    Raises:
        ValueError: block_size below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1 token")
    return _each(workload, block_size, generated)


def _each(workload: Workload, block_size: int, generated: bool) -> Iterator[list[bytes]]:
    prompts = workload.prompt_tokens.tolist()
    outputs = workload.output_tokens.tolist() if generated else [0] * len(prompts)
    chains = _Chains(workload.hash_block, block_size)
    for request, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        ids = () if workload.hash_ids is None else workload.hash_ids[request]
        shared = chains.keys(ids)[: prompt // block_size]
        yield shared + _own_keys(request, (prompt + output) // block_size)[len(shared) :]


def trace_chains(workload: Workload) -> Iterator[list[bytes]]:
    """For each request in turn, a key for each of its `hash_ids`, also for a partial last block.

    As above, a key stands for its block and everything before it. This is how studies of caches count a trace's blocks;
    a serving engine shares full blocks only.

    Raises:
        ValueError: the workload has no hash_ids.
    """
    if workload.hash_ids is None:
        raise ValueError(f"{workload.name} has no prefix blocks (hash_ids) to study")
    chains = _Chains(workload.hash_block, workload.hash_block)
    return (chains.keys(ids) for ids in workload.hash_ids)


def _own_keys(request: int, blocks: int) -> list[bytes]:
    return _split(shake_128(b"own%d" % request).digest(KEY_BYTES * blocks))


def _split(joined: bytes) -> list[bytes]:
    return [joined[at : at + KEY_BYTES] for at in range(0, len(joined), KEY_BYTES)]


class _Chains:
    """Keys by chain of hash ids. What two requests share is worked out and stored once."""

    def __init__(self, hash_block: int, block_size: int) -> None:
        self.hash_block, self.block_size = hash_block, block_size
        self._links: dict[tuple[bytes, int], tuple[bytes, list[bytes]]] = {}

    def keys(self, ids: tuple[int, ...]) -> list[bytes]:
        """Keys of the full blocks that end within `len(ids)` hash blocks."""
        chain = b""
        keys: list[bytes] = []
        for position, block in enumerate(ids):
            link = self._links.get((chain, block))
            if link is None:
                link = self._links[chain, block] = self._link(chain, block, position)
            chain, ending_here = link
            keys += ending_here
        return keys

    def _link(self, chain: bytes, block: int, position: int) -> tuple[bytes, list[bytes]]:
        """The chain after one more hash block, and the keys of the blocks that end inside it.

        A block that ends here depends on this hash block and on all before it: on the chain.
        """
        longer = blake2b(chain + b"%d" % block, digest_size=KEY_BYTES).digest()
        ended = position * self.hash_block // self.block_size
        ends = (position + 1) * self.hash_block // self.block_size
        return longer, _split(shake_128(longer).digest(KEY_BYTES * (ends - ended)))


def reblocked(workload: Workload, block: int) -> Workload:
    """The workload with prefix blocks of another size: whoever shared tokens still does, in whole blocks of that size.

    Blocks that reach past a request's hash_ids get none. Raises ValueError where there are no hash_ids.
    """
    if workload.hash_ids is None:
        raise ValueError(f"{workload.name} has no prefix blocks (hash_ids) to cut anew")
    if block < 1:
        raise ValueError(f"block_size is {block}; it must be at least 1 token")
    chains = _Chains(workload.hash_block, block)
    numbers: dict[bytes, int] = {}
    ids = [
        tuple(numbers.setdefault(key, len(numbers)) for key in chains.keys(of)[: -(-prompt // block)])
        for of, prompt in zip(workload.hash_ids, workload.prompt_tokens.tolist(), strict=True)
    ]
    return workload.replace(hash_ids=ids, hash_block=block).note("reblocked", block=block)
