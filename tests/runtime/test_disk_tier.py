"""Prefixes that come back from disk: whatever the schedule and the disk do, tokens are those of memory ample."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import runtime.disk
from policies.plan import DiskCopy
from policies.replica_state import Limits
from policies.stack import StackSpec
from runtime.disk import BadBlock, DiskFolder, DiskStore, read_block, write_block
from runtime.engine import Engine
from runtime.model_config import ModelError
from tests.runtime.engines import PATIENCE, Listener, Rows, greedy, tiny, tokens_of
from tests.runtime.test_host_tier import AMPLE, AtRandom, Tokens, conversations

MODEL, KEY = bytes(32), b"prefix"


def limits(folder: Path, **more: Any) -> Limits:
    few = {"num_host_blocks": 24, "num_disk_blocks": 200, "disk_folder": str(folder), "lag": 1, **more}
    return Limits(26, 8, 4, 64, 256, **few)


def engine(folder: Path, rows: Rows, offload: str = "write_through") -> Engine:
    return Engine(tiny(), limits(folder), StackSpec(offload=offload).build(block_size=8), recorder=rows, check=True)


@pytest.fixture(scope="module")
def expected() -> Tokens:
    with Engine(tiny(), AMPLE, StackSpec().build(block_size=8)) as ample:
        return conversations(ample, 3)[0]


def total(rows: Rows, column: str) -> int:
    return sum(step[column] for step in rows.steps)


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=st.data())
def test_conversations_in_a_random_schedule_say_what_they_say_with_memory_ample(
    data: st.DataObject,
    expected: Tokens,
    tmp_path: Path,
) -> None:
    offload = data.draw(st.sampled_from(["write_through", "write_back", "write_through,ahead=true", "after_hits"]))
    rows, scheduler = Rows(), AtRandom(data.draw(st.integers(0, 99)))
    stack = StackSpec(offload=offload).build(block_size=8)
    stack.scheduler = scheduler
    few = limits(tmp_path, lag=data.draw(st.integers(0, 1)), num_host_blocks=data.draw(st.integers(14, 30)))
    with Engine(tiny(), few, stack, recorder=rows, check=True) as running:
        assert conversations(running, 3)[0] == expected
    told = [row for row in rows.decisions if row["kind"] == "disk"]
    assert {row["reason"] for row in told} <= {""}
    assert total(rows, "disk_out") > 0
    assert not list(tmp_path.glob("*/block-*"))


TALKS = [[i + 1] * 3 + [(5 * i + 7 * j) % 500 + 1 for j in range(60)] for i in range(8)]
"""Eight blocks each: the device has 26, the host 24."""


def test_damaged_truncated_and_missing_files_are_dropped_counted_and_computed_again(tmp_path: Path) -> None:
    rows = Rows()
    with engine(tmp_path, rows, "write_through,fetch=always") as running:
        said = tokens_of(running.generate(TALKS, greedy(4)))
        assert tokens_of(running.generate(TALKS, greedy(4))) == said
        assert sum(row["disk_tokens"] for row in rows.requests.values()) > 0
        running.call(lambda plane, now: None).result()
        files = sorted(tmp_path.glob("0/block-*.kv"))
        for i, file in enumerate(files):
            content = file.read_bytes()
            if i % 3 == 0:
                file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            elif i % 3 == 1:
                file.write_bytes(content[:-9])
            else:
                file.unlink()
        assert tokens_of(running.generate(TALKS, greedy(4))) == said
        assert tokens_of(running.generate(TALKS, greedy(4))) == said
        running.generate([[99] * 30], greedy(2))  # whose plans come after all that was found out
    reasons = [row["reason"] for row in rows.decisions if row["kind"] == "disk" and row["reason"]]
    assert {"damaged", "truncated", "missing"} >= set(reasons) != set()
    assert total(rows, "disk_dropped") >= len(reasons)  # besides these, what was not written in time


def test_a_full_disk_keeps_nothing_and_serving_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runtime.disk, "write_block", full)
    rows = Rows()
    with engine(tmp_path, rows) as running:
        said = tokens_of(running.generate(TALKS, greedy(4)))
        assert tokens_of(running.generate(TALKS, greedy(4))) == said
    assert {row["reason"] for row in rows.decisions if row["kind"] == "disk"} == {"disk full"}
    assert total(rows, "disk_in") == 0
    assert total(rows, "disk_dropped") > 0


def test_who_goes_away_while_its_blocks_are_read_disturbs_nobody_and_steps_do_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on = threading.Event(), threading.Event()

    def slowly(*given: Any) -> None:
        reading.set()
        assert go_on.wait(PATIENCE)
        read_block(*given)

    rows = Rows()
    with engine(tmp_path, rows, "write_through,fetch=always") as running:
        other = Listener()
        said = tokens_of(running.generate(TALKS, greedy(4)))
        running.generate([[99] * 30], greedy(2))
        monkeypatch.setattr(runtime.disk, "read_block", slowly)
        running.submit([7, 8, 9], greedy(60), other)  # which runs already when the next one waits
        leaves = Listener()
        leaving = running.submit(TALKS[0], greedy(4), leaves)
        assert reading.wait(PATIENCE)
        running.cancel(leaving)
        assert leaves.last().finish_reason == "cancelled"
        assert other.last().finish_reason == "length"  # with the disk still busy
        go_on.set()
        assert tokens_of(running.generate(TALKS, greedy(4))) == said
    assert total(rows, "disk_in") > 0
    # Nothing is lost on its way. (A write may come too late on a busy machine, which is a loss without a reason.)
    assert {row["reason"] for row in rows.decisions if row["kind"] == "disk"} == {""}


def test_a_file_is_read_back_only_as_what_was_written_whole_by_the_same_model(tmp_path: Path) -> None:
    path, content = tmp_path / "block-0.kv", bytes(range(200))
    write_block(path, MODEL, KEY, memoryview(content))
    there = bytearray(200)
    read_block(path, MODEL, KEY, memoryview(there))
    assert there == content
    assert [file.name for file in tmp_path.iterdir()] == ["block-0.kv"]
    whole = path.read_bytes()

    def why(model: bytes = MODEL, key: bytes = KEY, size: int = 200) -> str:
        with pytest.raises(BadBlock) as found:
            read_block(path, model, key, memoryview(bytearray(size)))
        return str(found.value)

    assert (why(model=b"x" * 32), why(size=100), why(key=b"other")) == ("another model",) * 2 + ("another block",)
    for cut in (0, 20, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert why() == "truncated"
    for at in (len(whole) - 200, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert why() == "damaged"


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Host:
        def block_bytes(self, host: int) -> memoryview:
            return memoryview(bytearray(64))

    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = DiskStore(str(tmp_path), MODEL, Host())
    told: dict[int, str] = {}
    monkeypatch.setattr(Path, "rename", full)
    store.start([DiskCopy(0, True, 0, 0, KEY)], lambda: None, told.__setitem__)
    store.wait()
    monkeypatch.undo()
    store.start([DiskCopy(1, False, 0, 0, KEY)], lambda: None, told.__setitem__)
    store.wait()
    assert told == {0: "disk full", 1: "missing"}
    assert not list(tmp_path.glob("0/block-*"))
    store.close()


def test_each_server_has_a_folder_of_its_own_and_finds_it_empty(tmp_path: Path) -> None:
    first = DiskFolder(str(tmp_path))
    first.file(3).write_bytes(b"left")
    second = DiskFolder(str(tmp_path))
    assert first.path != second.path
    assert first.file(3).exists()
    second.close()
    first.close()
    (tmp_path / "0" / "block-9.part").write_bytes(b"killed")
    again = DiskFolder(str(tmp_path))
    assert again.path == first.path
    assert not list(again.path.glob("block-*"))
    again.close()
    with pytest.raises(ModelError, match=r"needs a folder; give limits\.disk_folder"):
        DiskFolder("")
