"""The index by hash chains hits what a radix tree over tokens hits, which is the other way to index prefixes (SGLang).

A tree shares what two prompts have in common token by token, but the KV cache is in blocks, so a hit is rounded down
to whole blocks either way. The tree here is a reference and no policy: with equal hits there is nothing to choose. It
gives up blocks one by one from the end of its least recently used leaf; SGLang frees whole leaves, often more than it
needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import example, given, settings
from hypothesis import strategies as st

from policies.block_pool import BlockPool
from policies.eviction.lru import Lru
from policies.prefix import block_keys

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Node:
    """An edge and its end: some whole blocks of tokens, and what comes behind them, by their first block."""

    tokens: Tokens
    parent: Node | None
    used: int = 0
    children: dict[Tokens, Node] = field(default_factory=dict)


class RadixCache:
    """A tree of token runs of whole blocks, compared token by token."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.size, self.free = block_size, num_blocks
        self.root = Node((), None)

    def serve(self, tokens: Tokens, now: int) -> int:
        """A request comes and goes: the tokens that it hits."""
        whole = tokens[: len(tokens) // self.size * self.size]
        node, hit = self._match(whole, now)
        while self.free < (len(whole) - hit) // self.size:
            self._evict_block(now)
        if hit < len(whole):
            node.children[whole[hit : hit + self.size]] = Node(whole[hit:], node, now)
            self.free -= (len(whole) - hit) // self.size
        return hit

    def _match(self, tokens: Tokens, now: int) -> tuple[Node, int]:
        """The node where the longest match ends, made by a split if need be, and the length; the path is used now."""
        node, at = self.root, 0
        while (child := node.children.get(tokens[at : at + self.size])) is not None:
            common = 0
            while common < min(len(child.tokens), len(tokens) - at) and child.tokens[common] == tokens[at + common]:
                common += 1
            common -= common % self.size
            if common < len(child.tokens):
                child = self._split(child, common)
            child.used = now
            node, at = child, at + common
        return node, at

    def _split(self, node: Node, at: int) -> Node:
        assert node.parent is not None
        head = Node(node.tokens[:at], node.parent, node.used)
        node.parent.children[head.tokens[: self.size]] = head
        node.tokens, node.parent = node.tokens[at:], head
        head.children[node.tokens[: self.size]] = node
        return head

    def nodes(self) -> list[Node]:
        found = [self.root]
        for node in found:
            found += node.children.values()
        return found[1:]

    def _evict_block(self, now: int) -> None:
        leaf = min((n for n in self.nodes() if not n.children and n.used < now), key=lambda n: n.used)
        first = leaf.tokens[: self.size]
        leaf.tokens = leaf.tokens[: -self.size]
        self.free += 1
        if not leaf.tokens:
            assert leaf.parent is not None
            del leaf.parent.children[first]

    def prefixes(self) -> set[Tokens]:
        """Every cached block, with all that stands before it."""
        found: set[Tokens] = set()

        def walk(node: Node, before: Tokens) -> None:
            for end in range(self.size, len(node.tokens) + 1, self.size):
                found.add(before + node.tokens[:end])
            for child in node.children.values():
                walk(child, before + node.tokens)

        walk(self.root, ())
        return found


class HashCache:
    """The pool that serves, with its chain of hashes and LRU."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks, Lru())
        self.size = block_size

    def serve(self, tokens: Tokens, now: int) -> int:
        keys = block_keys(tokens, self.size)
        hit = self.pool.lookup(keys)
        self.pool.claim(hit, now)
        held = [block.id for block in hit] + self.pool.allocate(len(keys) - len(hit), now)
        for depth in range(len(hit), len(keys)):
            self.pool.register(held[depth], keys[depth], depth, now, keys[depth - 1] if depth else None)
        self.pool.release(held, now)
        return len(hit) * self.size

    def has(self, prefix: Tokens) -> bool:
        return len(self.pool.lookup(block_keys(prefix, self.size))) == len(prefix) // self.size


@st.composite
def prompts(draw: st.DrawFn) -> list[Tokens]:
    """Prompts that go on from a prefix of an earlier one, of any length, with few different tokens."""
    made: list[Tokens] = [()]
    for _ in range(draw(st.integers(1, 25))):
        before = draw(st.sampled_from(made))
        keep = draw(st.integers(0, len(before)))
        made.append((before[:keep] + tuple(draw(st.lists(st.integers(0, 2), max_size=14))))[:24])
    return made


@settings(max_examples=200, deadline=None)
@given(prompts(), st.integers(1, 4), st.integers(0, 20))
@example([(0,) * 8, (0,) * 6 + (1,) * 6, (0,) * 9, (2,) * 24], 2, 0)
def test_a_radix_tree_and_a_hash_chain_hit_the_same_tokens(work: list[Tokens], block_size: int, more: int) -> None:
    num_blocks = -(-24 // block_size) + more
    tree, chain = RadixCache(num_blocks, block_size), HashCache(num_blocks, block_size)
    for now, tokens in enumerate(work, 1):
        assert tree.serve(tokens, now) == chain.serve(tokens, now)
        cached = tree.prefixes()
        assert all(chain.has(prefix) for prefix in cached)
        assert len(cached) == chain.pool.num_idle == num_blocks - tree.free
