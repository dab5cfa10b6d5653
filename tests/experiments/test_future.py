"""A policy that is told the block keys to come gets them in the simulator, and a replay tells them again."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.divergence import diff_decisions
from experiments.records import RunError, read_run
from experiments.replaying import replay_run
from experiments.simulated import run_simulated
from experiments.spec import SpecError, check_spec
from experiments.workloads import Workload, WorkloadSpec, make_workload


def _spec(eviction: str, **more: object) -> dict[str, object]:
    return {
        "workload": {"name": "prefix-chat", "n": 150, "rate": 2.0},
        "policies": {"eviction": eviction},
        "cost": {"kind": "constant", "step_ms": 20},
        "limits": {"num_blocks": 9_000, "max_num_batched_tokens": 8192, "max_model_len": 130_000, "block_size": 16},
        **more,
    }


@pytest.fixture(scope="module")
def workload() -> Workload:
    return make_workload(WorkloadSpec(name="prefix-chat", n=150, rate=2.0))


def _cached(folder: Path) -> int:
    return int(read_run(folder).requests["cached_tokens"].sum())


def test_who_knows_the_future_hits_more_and_replays_without_a_divergence(workload: Workload, tmp_path: Path) -> None:
    for eviction in ("lru", "belady"):
        run_simulated(check_spec(_spec(eviction)), tmp_path / eviction, workload=workload)
    assert _cached(tmp_path / "belady") > 1.1 * _cached(tmp_path / "lru") > 0
    run = read_run(tmp_path / "belady")
    assert run.clairvoyant
    replay_run(run, tmp_path / "replay", check=False)
    assert diff_decisions(run, read_run(tmp_path / "replay")) is None
    assert _cached(tmp_path / "replay") == _cached(tmp_path / "belady")


def test_requests_that_are_refused_are_part_of_the_future_in_a_replay_too(tmp_path: Path) -> None:
    workload = make_workload(WorkloadSpec(name="prefix-chat", n=60, rate=4.0))
    spec = _spec("belady")
    spec["limits"] = {**spec["limits"], "num_blocks": 1_500, "max_model_len": 20_000}  # type: ignore[dict-item]
    run_simulated(check_spec(spec), tmp_path / "run", workload=workload)
    run = read_run(tmp_path / "run")
    refused = run.table("requests").to_pandas().query("status == 'refused'")
    assert len(refused) > 3
    assert all(len(keys) for keys in refused["block_keys"])
    replay_run(run, tmp_path / "replay")
    assert diff_decisions(run, read_run(tmp_path / "replay")) is None


def test_without_a_cache_the_future_holds_no_keys(workload: Workload, tmp_path: Path) -> None:
    spec = _spec("belady")
    spec["limits"] = {**spec["limits"], "prefix_caching": False}  # type: ignore[dict-item]
    run_simulated(check_spec(spec), tmp_path / "run", workload=workload.slice(5))
    assert _cached(tmp_path / "run") == 0


def test_the_future_of_several_replicas_is_refused(workload: Workload, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="needs one replica"):
        run_simulated(check_spec(_spec("belady", replicas=2)), tmp_path / "run", workload=workload)


def test_a_run_that_was_cut_short_does_not_have_the_future_that_it_was_told(workload: Workload, tmp_path: Path) -> None:
    def interrupt(request: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_simulated(check_spec(_spec("belady")), tmp_path / "run", workload=workload, on_end=interrupt)
    with pytest.raises(RunError, match="told of requests that it does not have"):
        replay_run(read_run(tmp_path / "run"), tmp_path / "replay")
