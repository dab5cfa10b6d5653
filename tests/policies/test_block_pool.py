"""The block pool against a model that keeps one list of blocks and walks it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from policies.block_pool import BlockPool
from policies.eviction.lru import Lru
from policies.prefix import block_keys

SIZE = 4
CHAINS = [block_keys([chain] * 24, SIZE) for chain in range(3)]


class PoolAgainstModel(RuleBasedStateMachine):
    """The model: for each block its key or None, its holders, and since when it is idle (a counter)."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(9, Lru())
        self.key: dict[int, bytes | None] = dict.fromkeys(range(9))
        self.idle_since: dict[int, int] = {}
        self.tables: dict[int, list[int]] = {}
        self.clock = 0
        self.next_table = 0

    def holders(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables.values())

    def where(self, key: bytes) -> int | None:
        return next((block for block, k in self.key.items() if k == key), None)

    def allocatable(self) -> list[int]:
        return [block for block in self.key if self.holders(block) == 0]

    def take(self, count: int) -> list[int]:
        """Allocate, and check that only as many idle blocks went as had to, longest idle first."""
        blank = [block for block in self.allocatable() if self.key[block] is None]
        evicted = sorted(self.idle_since, key=self.idle_since.__getitem__)[: max(0, count - len(blank))]
        taken = self.pool.allocate(count, self.clock)
        assert len(taken) == len(set(taken)) == count
        assert set(taken) <= {*blank, *evicted}
        assert set(evicted) <= set(taken)
        for block in evicted:
            self.key[block] = None
            del self.idle_since[block]
        return taken

    @rule(chain=st.sampled_from(CHAINS), length=st.integers(1, 6))
    def start(self, chain: list[bytes], length: int) -> None:
        """A request hits what it can and allocates the rest; its full blocks are named."""
        hit = self.pool.lookup(chain[:length])
        expected = []
        for key in chain[:length]:
            block = self.where(key)
            if block is None:
                break
            expected.append(block)
        assert [block.id for block in hit] == expected
        idle = sum(self.holders(block) == 0 for block in expected)
        if length - len(hit) > len(self.allocatable()) - idle:
            return
        self.clock += 1
        self.pool.claim(hit, self.clock)
        for block in expected:
            self.idle_since.pop(block, None)
        table = self.tables[self.next_table] = list(expected)
        self.next_table += 1
        table += self.take(length - len(hit))
        for depth in range(len(hit), length):
            new = self.where(chain[depth]) is None
            assert (self.pool.register(table[depth], chain[depth], depth, self.clock) is not None) is new
            if new:
                self.key[table[depth]] = chain[depth]

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), count=st.integers(0, 3))
    def grow(self, data: st.DataObject, count: int) -> None:
        """A request takes blocks without a name, as a partly filled one is."""
        table = self.tables[data.draw(st.sampled_from(sorted(self.tables)))]
        if count <= len(self.allocatable()):
            table += self.take(count)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.sampled_from(sorted(self.tables))))
        freed = self.pool.num_freed_by(table, {})
        before = self.pool.num_free
        self.pool.release(table, self.clock)
        assert self.pool.num_free == before + freed
        for block in reversed(table):  # the tail goes idle, and so is evicted, before the head
            if self.holders(block) == 0 and self.key[block] is not None:
                self.clock += 1
                self.idle_since[block] = self.clock

    @precondition(lambda self: len(self.tables) > 1)
    @rule(data=st.data())
    def ends_foreseen_together(self, data: st.DataObject) -> None:
        """What several requests would free, shared blocks included, is what their ends free."""
        names = data.draw(st.lists(st.sampled_from(sorted(self.tables)), min_size=2, unique=True))
        already: dict[int, int] = {}
        foreseen = sum(self.pool.num_freed_by(self.tables[name], already) for name in names)
        left = [b for name, table in self.tables.items() if name not in names for b in table]
        assert foreseen == len({b for name in names for b in self.tables[name]} - set(left))

    @rule()
    def flush(self) -> None:
        assert self.pool.flush() == len(self.idle_since)
        for block in self.idle_since:
            self.key[block] = None
        self.idle_since.clear()

    @invariant()
    def agrees(self) -> None:
        self.pool.check([table for table in self.tables.values() if table])
        assert self.pool.num_free == len(self.allocatable())
        assert self.pool.num_idle == len(self.idle_since)


TestPoolAgainstModel = PoolAgainstModel.TestCase
TestPoolAgainstModel.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_the_end_of_a_chain_is_evicted_before_its_head() -> None:
    pool, keys = BlockPool(4, Lru()), CHAINS[0][:4]
    table = pool.allocate(4, 0)
    for depth, (block, key) in enumerate(zip(table, keys, strict=True)):
        pool.register(block, key, depth, 0)
    pool.release(table, 0)
    for left in (3, 2, 1, 0):
        pool.allocate(1, 1)
        assert [block.depth for block in pool.lookup(keys)] == list(range(left))


def test_a_block_that_was_hit_is_not_evicted() -> None:
    pool, keys = BlockPool(3, Lru()), CHAINS[0][:2]
    table = pool.allocate(2, 0)
    for depth in (0, 1):
        pool.register(table[depth], keys[depth], depth, 0)
    pool.release(table, 0)
    hit = pool.lookup(keys[:1])
    pool.claim(hit, 1)
    assert pool.num_free == 2
    assert hit[0].id not in pool.allocate(2, 1)
    assert pool.lookup(keys) == hit
    assert (hit[0].references, hit[0].hits, hit[0].last_used_ns) == (1, 1, 1)


def test_a_block_is_used_as_long_as_it_is_held_and_its_content_takes_no_blank_block() -> None:
    """What an eviction policy sees of it: when it was used last."""
    pool = BlockPool(3, Lru())
    table = pool.allocate(2, 10)
    block = pool.register(table[0], b"k", 0, 20)
    assert block is not None
    assert (block.last_used_ns, pool.num_unused) == (20, 1)
    pool.release(table, 30)
    assert (block.last_used_ns, pool.num_unused, pool.num_free) == (30, 2, 3)
    pool.claim([block], 40)
    pool.claim([block], 41)
    pool.release([block.id], 50)
    assert block.last_used_ns == 41  # somebody holds it still
    pool.release([block.id], 60)
    assert block.last_used_ns == 60


def test_looking_up_changes_nothing() -> None:
    """The block that was looked up last is evicted like any other: a probe does not make it recent."""
    pool, keys = BlockPool(2, Lru()), [CHAINS[0][0], CHAINS[1][0]]
    for key in keys:
        block = pool.allocate(1, 0)
        pool.register(block[0], key, 0, 0)
        pool.release(block, 0)
    pool.lookup(keys[:1])
    pool.allocate(1, 0)
    assert [len(pool.lookup([key])) for key in keys] == [0, 1]


def test_a_key_stands_for_one_block_at_a_time() -> None:
    pool = BlockPool(2, Lru())
    first, second = pool.allocate(2, 0)
    assert pool.register(first, b"k", 0, 0)
    assert not pool.register(second, b"k", 0, 0)
    pool.release([second], 0)
    assert (pool.num_free, pool.num_idle) == (1, 0)


def test_without_an_eviction_policy_nothing_is_idle() -> None:
    pool = BlockPool(4, None)
    table = pool.allocate(3, 0)
    assert pool.num_freed_by(table, {}) == 3
    pool.release(table, 0)
    assert (pool.num_free, pool.num_idle, pool.flush()) == (4, 0, 0)


def test_allocating_no_blocks_takes_none() -> None:
    pool = BlockPool(4, None)
    assert pool.allocate(0, 0) == []
    assert pool.num_free == 4


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda pool, table: table.append(3), "a held block is on the free stack"),
        (lambda pool, table: pool._free.append(3), "a block is on the free stack twice"),
        (lambda pool, table: pool._free.pop(), "blocks not conserved: 3 of 4"),
        (lambda pool, table: setattr(pool._registered[0], "references", 2), "block 0: wrong reference count"),
        (lambda pool, table: setattr(pool, "num_idle", 1), "the count of idle blocks is wrong"),
        (lambda pool, table: table.append(1), "unregistered blocks held twice"),
    ],
)
def test_the_pools_own_check_notices_books_that_are_wrong(break_it: object, message: str) -> None:
    pool = BlockPool(4, Lru())
    table = pool.allocate(2, 0)
    assert table == [0, 1]
    pool.register(0, b"k", 0, 0)
    pool.check([table])
    break_it(pool, table)  # type: ignore[operator]
    with pytest.raises(AssertionError, match=message):
        pool.check([table])
