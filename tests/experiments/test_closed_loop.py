"""Closed loops in both panels: who comes when, what policies are told, and that records and replays stay exact."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.divergence import diff_decisions
from experiments.metrics import summarize
from experiments.programs import program_times
from experiments.real import load, run_real
from experiments.records import Run, read_run
from experiments.replaying import replay_run
from experiments.simulated import run_simulated
from experiments.spec import RunSpec, SpecError, check_spec
from experiments.timeline import check_books
from experiments.workloads import Workload
from runtime.weights import LoadedModel
from tests.experiments.command import diptych

MS = 1_000_000
FIGURE_2 = ((4, 3, 1, 1), (3, 3, 4), (1, 2), (4,))
"""Programs A, B, C, D of Agentix's figure 2: the lengths of their calls, one after another."""
FINE = "quantum_ms=1,factor=1,levels=20,beta=0,demote=false"
STACKS = [
    {"scheduler": "preemptive,mode=keep", "queue": "plas,quantum_ms=3,beta=2"},
    {"scheduler": "preemptive", "queue": "atlas,quantum_ms=3,beta=2"},
    {"scheduler": "continuum,default_ttl_ms=4"},
]


def spec_of(policies: dict[str, str] | None = None, **limits: object) -> RunSpec:
    """Steps of a millisecond."""
    tight = {"num_blocks": 40, "max_num_seqs": 6, "max_num_batched_tokens": 64, "max_model_len": 200, **limits}
    return check_spec(
        {
            "workload": {"name": "fixed", "n": 1},
            "model": {"source": "tiny", "load_format": "dummy"},
            "policies": policies or {},
            "limits": tight,
            "cost": {"kind": "constant", "step_ms": 1},
        }
    )


def agents(seed: int, n: int = 6) -> Workload:
    """Programs that plan, call one to three tools side by side, and put together what those said."""
    draw = np.random.default_rng(seed)
    rows: list[tuple[int, int, int, tuple[int, ...], int]] = []  # arrival, program, tool, parents, gap
    for program in range(n):
        at, first = int(draw.integers(0, 20 * MS)), len(rows)
        rows.append((at, program, 0, (), 0))
        width = int(draw.integers(1, 4))
        rows += [(at, program, 1 + k, (first,), int(draw.choice([0, 2 * MS, 300_000]))) for k in range(width)]
        rows.append((at, program, -1, tuple(range(first + 1, first + 1 + width)), int(draw.integers(0, 3 * MS))))
    order = sorted(range(len(rows)), key=lambda i: (rows[i][0], i))
    place = {old: new for new, old in enumerate(order)}
    at, program, tool, parents, gaps = zip(*(rows[i] for i in order), strict=True)
    return Workload.build(
        at,
        draw.integers(1, 70, len(rows)),
        draw.integers(1, 30, len(rows)),
        program=program,
        tool=tool,
        parents=[tuple(place[p] for p in of) for of in parents],
        gap_ns=gaps,
        declared_output=draw.integers(1, 30, len(rows)),
    )


def by_id(run: Run) -> list[dict]:
    return sorted(run.table("requests").to_pylist(), key=lambda row: row["request_id"])


def assert_replays(run: Run, folder: Path) -> None:
    replay_run(run, folder, check=True)
    replayed = read_run(folder)
    assert diff_decisions(run, replayed) is None
    assert run.steps.equals(replayed.steps)


@pytest.mark.parametrize(
    ("scheduler", "queue", "waits"),
    [
        ("mixed", "fcfs", 18),
        ("preemptive,mode=keep", f"plas,{FINE}", 14),
        ("preemptive,mode=keep", "plas,quantum_ms=2,factor=1,levels=20,beta=0", 13),
        ("preemptive,mode=keep", f"atlas,{FINE}", 14),
    ],
)
def test_figure_2_of_agentix_from_a_file_makes_each_charging_rules_sum_of_waits(
    scheduler: str,
    queue: str,
    waits: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle E1: all at time 0, two at a time, ties in the order A, B, C, D. Why PLAS makes 14 and not 12, it says."""
    lines = []
    for program, lengths in enumerate(FIGURE_2):
        for k, length in enumerate(lengths):
            call = {"arrival_ns": 0, "prompt_tokens": 1, "output_tokens": length, "program": program}
            lines.append({**call, "parents": [len(lines) - 1] if k else []})
    (tmp_path / "figure2.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = spec_of({"scheduler": scheduler, "queue": queue}, max_num_seqs=2, lag=0, prefix_caching=False)
    spec = given.model_dump(mode="json", exclude={"model"}, exclude_unset=True)
    spec |= {"workload": {"name": str(tmp_path / "figure2.jsonl")}}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    status, _, error = diptych(monkeypatch, capsys, "simulate", f"{tmp_path}/spec.yaml", "-o", f"{tmp_path}/run")
    assert status == 0, error
    rows = by_id(read_run(tmp_path / "run"))
    spans = sum(row["finish_ns"] - row["arrival_ns"] for row in rows)
    assert spans == MS * (waits + sum(map(sum, FIGURE_2)))


def test_a_call_comes_its_gap_after_the_last_of_its_parents_has_ended(tmp_path: Path) -> None:
    """0 runs from 0 to 3 ms. 1 comes at 5, ends at 9; 2 comes at 8 and ends at 10; 3 comes 10 after both."""
    workload = Workload.build(
        [0, 0, 0, 0],
        [1, 1, 1, 1],
        [3, 4, 2, 1],
        parents=[(), (0,), (0,), (1, 2)],
        gap_ns=[9 * MS, 2 * MS, 5 * MS, 10 * MS],
        tool=[7, -1, 8, -1],
        session=[4, 4, 4, 4],
    )
    run_simulated(spec_of(lag=0), tmp_path / "run", workload=workload, check=True)
    rows = by_id(read_run(tmp_path / "run"))
    assert [(row["arrival_ns"] // MS, row["finish_ns"] // MS) for row in rows] == [(0, 3), (5, 9), (8, 10), (20, 21)]
    assert [row["parents"] for row in rows] == [[], [0], [0], [1, 2]]
    assert [dict(row["hints"]) for row in rows] == [{"tool": 7.0}, {}, {"tool": 8.0}, {}]
    assert {row["program"] for row in rows} == {4}


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("lag", [0, 1])
def test_whoever_ends_badly_is_followed_all_the_same(lag: int, replicas: int, tmp_path: Path) -> None:
    """The second turn can never be served, and the third comes at once."""
    workload = Workload.build([0, 0, 0, 0], [5, 900, 5, 5], [3, 3, 3, 3], parents=[(), (0,), (1,), (2,)])
    spec = spec_of(lag=lag).model_copy(update={"replicas": replicas})
    run_simulated(spec, tmp_path / "run", workload=workload, check=True)
    rows = by_id(read_run(tmp_path / "run"))
    assert [row["status"] for row in rows] == ["length", "refused", "length", "length"]
    assert rows[1]["arrival_ns"] == rows[2]["arrival_ns"] == rows[0]["finish_ns"]
    assert rows[3]["arrival_ns"] == rows[2]["finish_ns"]


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 99), st.sampled_from(STACKS), st.integers(0, 1), st.booleans())
def test_every_simulated_program_goes_its_way_to_the_nanosecond_and_replays(
    seed: int, policies: dict[str, str], lag: int, caching: bool
) -> None:
    workload = agents(seed)
    assert workload.parents is not None
    assert workload.gap_ns is not None
    with tempfile.TemporaryDirectory() as folder:
        spec = spec_of(policies, lag=lag, prefix_caching=caching, num_blocks=16)
        run_simulated(spec, Path(folder, "run"), workload=workload, check=True)
        run = read_run(Path(folder, "run"))
        rows = by_id(run)
        assert [row["request_id"] for row in rows] == list(range(len(workload)))
        for i, of in enumerate(workload.parents):
            came = max(rows[p]["finish_ns"] for p in of) + workload.gap_ns[i] if of else workload.arrival_ns[i]
            assert rows[i]["arrival_ns"] == came
            assert rows[i]["status"] in ("stop", "length")
        assert_replays(run, Path(folder, "replay"))


def test_a_program_takes_from_its_first_call_s_coming_to_its_last_one_s_end(tmp_path: Path) -> None:
    """Program 1 as above: 21 ms. Program 2 comes at 2 and has a call that is refused; 3 is one call, from 4 to 5 ms."""
    workload = Workload.build(
        [0, 0, 0, 0, 2 * MS, 3 * MS, 4 * MS],
        [1, 1, 1, 1, 1, 900, 1],
        [3, 4, 2, 1, 1, 1, 1],
        parents=[(), (0,), (0,), (1, 2), (), (4,), ()],
        gap_ns=[0, 2 * MS, 5 * MS, 10 * MS, 0, 0, 0],
        program=[1, 1, 1, 1, 2, 2, 3],
    )
    run_simulated(spec_of(lag=0), tmp_path / "run", workload=workload)
    run = read_run(tmp_path / "run")
    frame = program_times(run)
    assert frame is not None
    assert frame["calls"].tolist() == [4, 2, 1]
    assert frame["completed"].tolist() == [True, False, True]
    assert frame["time_ms"].fillna(-1.0).tolist() == [21.0, -1.0, 1.0]
    summary = summarize(run)
    assert (summary["programs"], summary["mean_program_ms"], summary["p99_program_ms"]) == (2, 11.0, 20.8)


def test_calls_that_belong_to_nothing_make_no_programs(tmp_path: Path) -> None:
    run_simulated(spec_of(), tmp_path / "run", workload=Workload.build([0, 5], [3, 3], [2, 2], session=[0, 1]))
    assert "programs" not in summarize(read_run(tmp_path / "run"))


def test_several_replicas_serve_a_closed_loop_and_say_so_twice_alike(tmp_path: Path) -> None:
    spec = spec_of(STACKS[1]).model_copy(update={"replicas": 3})
    for name in ("one", "two"):
        run_simulated(spec, tmp_path / name, workload=agents(5, 12), check=True)
    one, two = (by_id(read_run(tmp_path / name)) for name in ("one", "two"))
    assert one == two
    assert {row["replica"] for row in one} == {0, 1, 2}
    assert {row["status"] for row in one} <= {"stop", "length"}


def test_a_policy_that_is_told_the_future_is_refused_where_nobody_knows_it(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="needs arrivals that are known: no closed loop"):
        run_simulated(spec_of({"eviction": "belady"}), tmp_path / "run", workload=agents(0))


def impatient(spec: RunSpec, timeout_ms: float, retries: int) -> RunSpec:
    patience = {"timeout_s": timeout_ms / 1e3, "retries": retries}
    return spec.model_copy(update={"workload": spec.workload.model_copy(update=patience)})


def test_clients_that_have_no_answer_in_time_give_up_and_try_again(tmp_path: Path) -> None:
    """One at a time, whole answers within 5 ms, two more tries. The first runs from 0 to 4. The second from 4 to 5,
    when its client goes; its next try from 5 to 9. The third waits from 0 to 5, from 5 to 10 (it has run for 1), and
    from 10 to 14. The fourth, which follows it, comes then, and never can be served in time: it is given up three
    times."""
    workload = Workload.build(
        [0] * 4, [1] * 4, [4, 4, 4, 9], parents=[(), (), (), (2,)], tool=[-1, -1, 3, -1], session=[0, 1, 2, 2]
    )
    run_simulated(impatient(spec_of(lag=0, max_num_seqs=1), 5, 2), tmp_path / "run", workload=workload, check=True)
    run = read_run(tmp_path / "run")
    found = {
        row["request_id"]: (row["arrival_ns"] // MS, row["finish_ns"] // MS, row["output_tokens"]) for row in by_id(run)
    }
    assert found == {
        0: (0, 4, 4),
        1: (0, 5, 1),
        5: (5, 9, 4),
        2: (0, 5, 0),
        6: (5, 10, 1),
        10: (10, 14, 4),
        3: (14, 19, 5),
        7: (19, 24, 5),
        11: (24, 29, 5),
    }
    summary = summarize(run)
    assert summary["statuses"]["cancelled"] == 6
    assert (summary["retries"], summary["answered"]) == (5, 3)
    assert summary["mean_answer_ms"] == (4 + 9 + 14) / 3
    programs = program_times(run)
    assert programs is not None
    assert programs["calls"].tolist() == [1, 1, 2]
    assert programs["time_ms"].fillna(-1.0).tolist() == [4.0, 9.0, -1.0]
    assert [row["parents"] for row in by_id(run) if row["request_id"] % 4 == 3] == [[10]] * 3
    assert {row["request_id"] for row in by_id(run) if dict(row["hints"]) == {"tool": 3.0}} == {2, 6, 10}
    assert_replays(run, tmp_path / "replay")


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 99), st.integers(0, 1), st.integers(0, 2), st.integers(1, 2), st.sampled_from([4, 12, 40]))
def test_whoever_gives_up_is_tried_as_often_as_asked_for_and_the_rest_of_its_program_follows(
    seed: int, lag: int, retries: int, replicas: int, timeout_ms: int
) -> None:
    workload, spec = agents(seed), spec_of(STACKS[1], lag=lag, num_blocks=16).model_copy(update={"replicas": replicas})
    n = len(workload)
    with tempfile.TemporaryDirectory() as folder:
        run_simulated(impatient(spec, timeout_ms, retries), Path(folder, "run"), workload=workload, check=True)
        run = read_run(Path(folder, "run"))
        rows = {row["request_id"]: row for row in by_id(run)}
        assert {i % n for i in rows} == set(range(n))
        for i in range(n):
            tries = [rows[i + k * n] for k in range(1 + retries) if i + k * n in rows]
            assert len(tries) == 1 + retries or tries[-1]["status"] in ("stop", "length")
            for before, after in itertools.pairwise(tries):
                assert after["arrival_ns"] == before["arrival_ns"] + timeout_ms * MS <= before["finish_ns"]
        if replicas == 1:
            assert_replays(run, Path(folder, "replay"))


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load(spec_of().model)


@pytest.mark.parametrize(
    "policies", STACKS[1:], ids=lambda stack: stack.get("queue", stack["scheduler"]).partition(",")[0]
)
def test_both_panels_tell_policies_the_same_and_a_real_closed_loop_replays_without_a_divergence(
    policies: dict[str, str], tiny: LoadedModel, tmp_path: Path
) -> None:
    workload, spec = agents(3), spec_of(policies, num_blocks=16)
    assert workload.parents is not None
    assert workload.gap_ns is not None
    run_real(spec, tmp_path / "real", workload=workload, loaded=tiny, check=True)
    run_simulated(spec, tmp_path / "sim", workload=workload)
    real, simulated = (by_id(read_run(tmp_path / name)) for name in ("real", "sim"))
    told = ("request_id", "program", "session", "parents", "hints", "priority", "prompt_tokens", "output_tokens")
    assert [[row[name] for name in told] for row in real] == [[row[name] for name in told] for row in simulated]
    for i, of in enumerate(workload.parents):
        for parent in of:
            assert real[i]["arrival_ns"] >= real[parent]["finish_ns"] + workload.gap_ns[i]
    check_books(read_run(tmp_path / "real"))
    assert_replays(read_run(tmp_path / "real"), tmp_path / "replay")


def test_real_clients_give_up_too_and_their_run_replays_without_a_divergence(tiny: LoadedModel, tmp_path: Path) -> None:
    """Of 150 tokens none can be done in 25 ms: a step takes a quarter of one here, at least."""
    workload = Workload.build([0, MS, 2 * MS], [20, 20, 20], [150, 150, 2], parents=[(), (), (0,)], gap_ns=[0, 0, MS])
    run_real(impatient(spec_of(), 25, 1), tmp_path / "real", workload=workload, loaded=tiny, check=True)
    rows = {row["request_id"]: row for row in by_id(read_run(tmp_path / "real"))}
    assert [rows[i]["status"] for i in (0, 1, 3, 4)] == ["cancelled"] * 4
    for first, second in ((0, 3), (1, 4)):
        # A client's clock runs from when it hands a request in, which is stamped after that.
        assert rows[second]["arrival_ns"] - rows[first]["arrival_ns"] >= 12 * MS
    assert rows[2]["parents"] == [3]
    assert rows[2]["arrival_ns"] >= rows[3]["finish_ns"] + MS
    check_books(read_run(tmp_path / "real"))
    assert_replays(read_run(tmp_path / "real"), tmp_path / "replay")
