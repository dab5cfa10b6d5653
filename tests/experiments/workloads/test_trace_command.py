"""`diptych trace`: what it writes can be read again, and means what it meant."""

from __future__ import annotations

import json
from itertools import takewhile
from operator import eq
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.workloads import Workload, load
from experiments.workloads.block_keys import block_keys, reblocked
from experiments.workloads.converting import TARGETS, write
from experiments.workloads.mixing import mix, of_tenants, within
from tests.experiments.command import diptych

SECOND = 1_000_000_000


def small(**columns: object) -> Workload:
    fields = {"hash_ids": [(1, 2), (1, 3), (1, 2, 4)], "hash_block": 16, "session": [4, 5, 4], **columns}
    return Workload.build([0, SECOND, 3 * SECOND + 7_000_000], [20, 30, 40], [5, 6, 7], name="small", **fields)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    count = draw(st.integers(1, 8))
    block = draw(st.sampled_from([16, 64]))
    prompts = [draw(st.integers(1, 200)) for _ in range(count)]
    ids = [tuple(draw(st.integers(0, 2)) + 3 * k for k in range(-(-prompt // block))) for prompt in prompts]
    times = sorted(draw(st.integers(0, 10**6)) * 1_000_000 for _ in range(count))
    return Workload.build(
        *([time - times[0] for time in times], prompts, [draw(st.integers(1, 50)) for _ in range(count)]),
        hash_ids=ids, hash_block=block, session=[draw(st.integers(0, 2)) for _ in range(count)],
    )  # fmt: skip


def shared(workload: Workload, block: int) -> list[list[int]]:
    """Between any two requests, how many leading blocks they have in common."""
    keys = list(block_keys(workload, block))
    return [[sum(takewhile(bool, map(eq, one, other))) for other in keys] for one in keys]


@pytest.mark.parametrize("target", TARGETS)
@given(made=workloads())
def test_what_is_written_in_another_format_is_read_as_it_was(
    target: str, made: Workload, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("t") / "trace.jsonl.gz"
    assert write(made, path, target) == []
    again = load(path, block_size=made.hash_block if target != "diptych" else None)
    assert again.provenance.get("format", "diptych") == target
    for column in ("arrival_ns", "prompt_tokens", "output_tokens", "max_tokens", "session"):
        assert np.array_equal(getattr(again, column), getattr(made, column)), column
    assert again.hash_block == made.hash_block
    assert shared(again, 16) == shared(made, 16)


@given(workloads(), st.sampled_from([8, 16, 32]))
def test_whoever_shared_whole_blocks_does_so_in_blocks_of_another_size(made: Workload, block: int) -> None:
    again = reblocked(made, block)
    assert again.hash_block == block
    assert shared(again, block) == shared(made, block)


def test_a_workload_without_blocks_gets_its_own_and_what_has_no_place_is_named(tmp_path: Path) -> None:
    made = Workload.build([0, 5], [33, 16], [1, 2], tenant=["a", "b"], max_tokens=[4, 9])
    assert write(made, tmp_path / "m.jsonl", "mooncake", block_size=16) == ["max_tokens", "tenant"]
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [row["hash_ids"] for row in rows] == [[0, 1, 2], [3]]
    assert [row["timestamp"] for row in rows] == [0, 0]


def test_a_stretch_of_time_begins_at_zero_and_holds_its_first_instant_and_not_its_last() -> None:
    part = within(small(), 1, 3)
    assert part.arrival_ns.tolist() == [0]
    assert part.prompt_tokens.tolist() == [30]
    assert within(small(), 1, None).arrival_ns.tolist() == [0, 2 * SECOND + 7_000_000]
    with pytest.raises(ValueError, match=r"small: no request arrives from 9 s; the last comes at 3.007 s"):
        within(small(), 9, None)


def test_a_tenant_that_is_not_there_is_refused_by_name() -> None:
    made = small(tenant=["a", "b", "a"])
    assert of_tenants(made, ["a"]).prompt_tokens.tolist() == [20, 40]
    with pytest.raises(ValueError, match="small has no tenant 'c'; it has a, b"):
        of_tenants(made, ["c"])


def test_mixed_traces_keep_their_times_and_share_nothing() -> None:
    other = Workload.build(
        [SECOND, 2 * SECOND], [16, 64], [3, 3], name="other", hash_ids=[(1,), (1, 2)], hash_block=32,
        session=[4, 4], parents=[(), (0,)], gap_ns=[0, 9],
    )  # fmt: skip
    mixed = mix([small(), other])
    assert mixed.arrival_ns.tolist() == sorted([*small().arrival_ns.tolist(), SECOND, 2 * SECOND])
    assert mixed.tenant == ["small", "small", "other", "other", "small"]
    assert mixed.session is not None
    assert len(set(mixed.session.tolist())) == 3
    assert mixed.parents == [(), (), (), (2,), ()]
    assert mixed.hash_block == 16
    matrix = shared(mixed, 16)
    assert matrix[0][4] == 1
    assert matrix[0][2] == matrix[1][3] == 0
    assert matrix[2][3] == 1  # half of its first block of 32


def test_mixing_one_trace_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        mix([small()])


def test_the_command_slices_scales_mixes_converts_and_describes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(words: str) -> tuple[int, str, str]:
        return diptych(monkeypatch, capsys, *words.split())

    monkeypatch.chdir(tmp_path)
    small(tenant=["a", "b", "a"]).to_jsonl("small.jsonl")
    status, out, _ = run("trace slice small.jsonl -o a.jsonl --tenant a")
    assert (status, "2 requests in 3.0 s: a.jsonl" in out) == (0, True)
    status, *_ = run("trace scale small.jsonl -o fast.jsonl --rate 10 --lengths 0.5")
    assert status == 0
    assert load("fast.jsonl").rate == pytest.approx(10)
    assert load("fast.jsonl").output_tokens.tolist() == [2, 3, 4]
    assert run("trace mix a.jsonl fast.jsonl -o both.jsonl.gz")[0] == 0
    status, out, _ = run("trace convert both.jsonl.gz --to mooncake -o m.jsonl")
    assert "mooncake has no place for max_tokens, tenant: left out" in out
    status, out, _ = run("trace describe m.jsonl small.jsonl --json d.json")
    assert "5 requests (mooncake)" in out
    assert "of 8 tokens" in out
    numbers = json.loads((tmp_path / "d.json").read_text())
    assert numbers["small.jsonl"]["prefixes"]["block_references"] == 7


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("describe nowhere.csv", "nowhere.csv: cannot be read"),
        ("convert small.jsonl --to azure -o x.csv", "--to azure: there is no such format to write"),
        ("convert small.jsonl --to mooncake -o small.jsonl", "small.jsonl exists"),
        ("scale small.jsonl -o x.jsonl", "say what to scale"),
        ("scale small.jsonl -o x.jsonl --rate 1 --time 2", "give one of them"),
        ("slice small.jsonl -o x.jsonl --from 2 --until 1", "no stretch of time"),
        ("describe small.jsonl --capacity 0", "at least 1 block"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    words: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small().to_jsonl("small.jsonl")
    status, _, err = diptych(monkeypatch, capsys, "trace", *words.split())
    assert status == 2
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "x.jsonl").exists()
