"""Closed loops as workloads: files, taking parts, new times, and the generators of sessions and agents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.bench.running import prepare
from experiments.bench.spec import check_bench
from experiments.spec import SpecError
from experiments.workloads import Workload, WorkloadSpec, make_workload
from experiments.workloads.closed_loop import Followers, roots
from experiments.workloads.errors import TraceError
from experiments.workloads.generators.programs import SIBLINGS, SUBAGENTS, SYSTEM_TOKENS, TOOL_MEANS_S

S = 10**9


def make(name: str, **fields: Any) -> Workload:
    return make_workload(WorkloadSpec(name=name, **fields))


def fork() -> Workload:
    """0 calls 1 and 2, which 3 waits for; 4 is another's first turn, 5 its second."""
    return Workload.build(
        [0, 10, 20, 30, 15, 40],
        [5] * 6,
        [2] * 6,
        parents=[(), (0,), (0,), (1, 2), (), (4,)],
        gap_ns=[0, 1, 2, 3, 0, 5],
        program=[7, 7, 7, 7, 8, 8],
        tool=[4, -1, -1, -1, 0, -1],
    )


def test_sorting_by_arrival_keeps_who_follows_whom() -> None:
    workload = fork()
    assert workload.program is not None
    assert workload.program.tolist() == [7, 7, 8, 7, 7, 8]
    assert workload.parents == [(), (0,), (), (0,), (1, 3), (2,)]
    assert roots(workload).tolist() == [0, 0, 2, 0, 0, 2]


def test_whoever_is_left_out_is_waited_for_no_more() -> None:
    kept = fork().take(np.array([0, 3, 4, 5]))
    assert kept.parents == [(), (0,), (1,), ()]
    assert fork().slice(4).parents == [(), (0,), (), (0,)]


def test_followers_come_after_the_last_of_their_parents() -> None:
    followers = Followers(fork())
    assert len(followers) == 4
    assert followers.ended(0, 100) == [(101, 1), (102, 3)]
    assert followers.ended(3, 110) == []
    assert followers.ended(1, 150) == [(153, 4)]
    assert followers.ended(4, 200) == []
    assert followers.ended(2, 300) == [(305, 5)]
    assert len(followers) == 0
    assert followers.ended(2, 400) == []


@pytest.mark.parametrize("parents", [[(), (1,)], [(1,), ()], [(), (-1,)], [(), (0, 0)]])
def test_parents_that_do_not_come_before_or_come_twice_are_refused(parents: list) -> None:
    with pytest.raises(ValueError, match=r"request [01] (has the parent|names a parent twice)"):
        Workload.build([0, 0], [1, 1], [1, 1], parents=parents)


def test_a_closed_loop_is_written_and_read_as_it_is(tmp_path: Path) -> None:
    fork().to_jsonl(tmp_path / "w.jsonl")
    assert Workload.from_jsonl(tmp_path / "w.jsonl") == fork()


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"parents": [1]}, "the parent 1 is no request that comes before this one"),
        ({"parents": [2]}, "the parent 2 is no request of this file"),
        ({"parents": [0, 0]}, "a parent is named twice"),
        ({"parents": 0}, "parents is 0; expected a list of whole numbers"),
        ({"parents": [0], "arrival_ns": 3}, "the parent 0 is no request that comes before this one"),
        ({"gap_ns": -1}, "gap_ns is -1; expected a whole number from 0"),
        ({"tool": -2}, "tool is -2; expected a whole number from -1"),
    ],
)
def test_a_file_with_parents_that_cannot_be_is_refused_by_its_line(second: dict, says: str, tmp_path: Path) -> None:
    call = {"arrival_ns": 5, "prompt_tokens": 1, "output_tokens": 1, "parents": [], "gap_ns": 0, "tool": 0}
    (tmp_path / "w.jsonl").write_text(f"{json.dumps(call)}\n{json.dumps({**call, **second})}\n")
    with pytest.raises(TraceError, match=f"w.jsonl:2: .*{says}"):
        Workload.from_jsonl(tmp_path / "w.jsonl")


def test_a_higher_rate_has_programs_start_sooner_and_nobody_think_faster() -> None:
    workload = fork()
    faster = workload.scale_rate(2 * workload.rate)
    assert faster.arrival_ns.tolist() == [0, 8, 10, 20, 30, 33]  # the second program starts at 7.5
    assert faster.parents == [(), (), (0,), (0,), (2, 3), (1,)]
    assert faster.gap_ns is not None
    assert faster.gap_ns.tolist() == [0, 0, 1, 2, 3, 5]
    slower = workload.scale_time(2.0)
    assert slower.gap_ns is not None
    assert slower.gap_ns.tolist() == [0, 2, 0, 4, 6, 10]


SESSIONS = {"requests": [], "hash_id_scope": "local", "block_size": 16}


def claude(path: Path, *think: float | None) -> str:
    """A session a number of think times, one call each."""
    calls = [
        {"t": 3.0 * k, "in": 20 + k, "out": 4, "hash_ids": [1], **({} if s is None else {"think_time": s})}
        for k, s in enumerate(think)
    ]
    lines = [{**SESSIONS, "requests": calls}, {**SESSIONS, "requests": calls[:1]}]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_the_sessions_of_a_trace_become_closed_loops_with_their_think_times(tmp_path: Path) -> None:
    name = claude(tmp_path / "c.jsonl", None, 1.5, 0.25)
    assert make(name).parents is None
    closed = make(name, closed=True)
    assert closed.parents == [(), (), (0,), (2,)]
    assert closed.gap_ns is not None
    assert closed.gap_ns.tolist() == [0, 0, 1_500_000_000, 250_000_000]
    drawn = make(name, closed=True, think_s=9.0, rate=0.5)
    assert drawn.parents is not None
    assert drawn.gap_ns is not None
    assert not np.isin(drawn.gap_ns, (0, 1_500_000_000)).any()
    starts = drawn.arrival_ns[[not of for of in drawn.parents]]
    assert starts[1] > starts[0] == 0  # they all start at 0 in the file


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": "chat", "n": 3, "turns": 2.0}, "turns is only for the workloads 'sessions' and 'agents'"),
        ({"name": "chat", "n": 3, "think_s": 2.0}, "think_s is for the workloads 'sessions' and 'agents'"),
        ({"name": "sessions", "n": 3, "closed": True}, "closed is for trace files"),
        ({"name": "agents", "n": 3, "arrivals": "poisson"}, "agents has arrivals of its own"),
    ],
)
def test_fields_of_closed_loops_are_refused_where_they_have_no_meaning(fields: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        WorkloadSpec(**fields)


def test_a_trace_without_sessions_or_think_times_is_no_closed_loop(tmp_path: Path) -> None:
    call = {"arrival_ns": 0, "prompt_tokens": 1, "output_tokens": 1}
    for row, says in ((call, "has no sessions"), ({**call, "session": 1}, "give think_s")):
        (tmp_path / "w.jsonl").write_text(json.dumps(row))
        with pytest.raises(ValueError, match=says):
            make(str(tmp_path / "w.jsonl"), closed=True)


def test_bench_sends_no_closed_loop() -> None:
    spec = check_bench(workload={"name": "agents", "n": 3}, model="m", base_url="http://localhost:1")
    with pytest.raises(SpecError, match="agents is a closed loop, which bench does not send"):
        prepare(spec, make_workload(spec.workload))


def test_sessions_have_as_many_turns_and_think_as_long_as_asked_for() -> None:
    workload = make("sessions", n=4000, rate=3.0, turns=4, think_s=6.0)
    assert workload.parents is not None
    assert workload.gap_ns is not None
    later = np.array([bool(of) for of in workload.parents])
    assert workload.rate == pytest.approx(3.0, rel=0.1)
    assert len(workload) / (~later).sum() == pytest.approx(4, rel=0.1)
    assert workload.gap_ns[later].mean() / S == pytest.approx(6.0, rel=0.06)
    outgrown = [i for i, of in enumerate(workload.parents) if of]
    for i in outgrown:
        (before,) = workload.parents[i]
        assert workload.prompt_tokens[i] > workload.prompt_tokens[before] + workload.output_tokens[before]


def test_agents_fork_join_and_name_the_tool_of_every_call_that_goes_on() -> None:
    workload = make("agents", n=4000, think_s=1.0)
    assert workload.parents is not None
    assert workload.gap_ns is not None
    assert workload.tool is not None
    assert workload.hash_ids is not None
    followed = {p for of in workload.parents for p in of}
    assert [tool >= 0 for tool in workload.tool] == [i in followed for i in range(len(workload))]
    assert {len(of) for of in workload.parents} == {0, 1, 2, 3, 4}
    for of in workload.parents:
        for parent in of:
            assert workload.tool[parent] in (range(SUBAGENTS + 1) if len(of) == 1 else (SIBLINGS,))
    for tool, mean in enumerate(TOOL_MEANS_S):
        gaps = [workload.gap_ns[i] for i, of in enumerate(workload.parents) if of and workload.tool[of[0]] == tool]
        assert np.mean(gaps) / S == pytest.approx(mean / 2, rel=0.15)
    head = tuple(range(SYSTEM_TOKENS // workload.hash_block))
    assert all(ids[: len(head)] == head for ids in workload.hash_ids)
