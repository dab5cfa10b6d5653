"""Runs of pools: what a specification says, what the records keep, and what comes of it in figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.pool_spec import read_pool
from experiments.real import check_servable
from experiments.records import read_run
from experiments.simulated import run_simulated
from experiments.spec import RunSpec, SpecError, check_spec
from experiments.timeline import check_books, timeline
from tests.experiments.command import diptych

SMALL = {
    "target": "sim",
    "workload": {"name": "chat", "n": 40, "rate": 20, "length_scale": 0.05, "seed": 3},
    "limits": {"num_blocks": 200, "max_model_len": 1024, "max_num_seqs": 8},
    "cost": {"kind": "constant", "step_ms": 5.0},
}


def spec(**more: Any) -> RunSpec:
    return check_spec({**SMALL, **more})


POOLS = [
    {"name": "fast", "replicas": 2, "cost": {"step_ms": 2.0}},
    {"name": "slow", "limits": {"num_blocks": 90, "max_num_seqs": 2}, "policies": {"scheduler": "sarathi"}},
]


@pytest.mark.parametrize("cached", [0, 1])
def test_a_pool_that_caches_prefixes_does_so_wherever_it_stands(cached: int, tmp_path: Path) -> None:
    pools = [{"name": "plain", "limits": {"prefix_caching": False}}]
    pools.insert(cached, {"name": "cached"})
    run_simulated(
        spec(workload={"name": "prefix-chat", "n": 30, "rate": 20}, limits={"num_blocks": 4000}, pools=pools),
        tmp_path / "run",
    )
    hits = read_run(tmp_path / "run").requests.groupby("replica")["cached_tokens"].sum()
    assert hits[cached] > 0 == hits[1 - cached]


def test_each_pool_is_recorded_and_has_what_it_says_and_what_the_run_says(tmp_path: Path) -> None:
    run_simulated(spec(pools=POOLS), tmp_path / "run", check=True)
    run = read_run(tmp_path / "run")
    assert [(p["name"], p["role"], p["replicas"], p["limits"]["num_blocks"], p["cost"]["ns"]) for p in run.pools] == [
        ("fast", "both", 2, 200, 2_000_000),
        ("slow", "both", 1, 90, 5_000_000),
    ]
    assert [p["stack"]["scheduler"] for p in run.pools] == ["mixed", "sarathi"]
    events = run.table("replicas").to_pylist()
    assert [(e["time_ns"], e["replica"], e["pool"], e["event"]) for e in events] == [
        (0, 0, "fast", "serve"),
        (0, 1, "fast", "serve"),
        (0, 2, "slow", "serve"),
    ]
    assert [run.limits_of(i)["max_num_seqs"] for i in range(3)] == [8, 8, 2]
    steps = run.steps.groupby("replica")
    assert (steps["device_ns"].max() == [2_000_000, 2_000_000, 5_000_000]).all()
    assert steps["num_running"].max()[2] == 2
    assert timeline(run)["kv_blocks"].iloc[-1] == 0
    assert check_spec(run.spec).pools == spec(pools=POOLS).pools  # the record gives the run again


def test_replicas_that_come_and_go_are_recorded_and_the_books_balance(tmp_path: Path) -> None:
    scaled = spec(policies={"autoscaler": "target_load,target=2,most=3,every_s=0.2,window_s=0.4"}, cold_start_s=0.3)
    run_simulated(scaled, tmp_path / "run", check=True)
    run = read_run(tmp_path / "run")
    events = run.table("replicas").to_pylist()
    assert {e["event"] for e in events} >= {"start", "serve"}
    starts = {e["replica"]: e["time_ns"] for e in events if e["event"] == "start"}
    serves = {e["replica"]: e["time_ns"] for e in events if e["event"] == "serve" and e["replica"] in starts}
    assert serves
    assert {serves[i] - starts[i] for i in serves} == {300_000_000}
    assert (run.requests["status"].isin(["stop", "length"])).all()
    check_books(run)


def test_a_run_without_pools_is_recorded_as_before(tmp_path: Path) -> None:
    run_simulated(spec(replicas=2), tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.pools == []
    assert run.info["tables"] == ["requests", "steps", "decisions"]
    assert run.limits_of(1) == run.limits


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        (
            [{"name": "a", "limits": {"num_blokcs": 8}}],
            "pool a: limits.num_blokcs: unknown field; did you mean 'num_bl",
        ),
        ([{"name": "a", "devise": "l4"}], r"pools.0.devise: unknown field; did you mean 'device'\?"),
        ([{"name": "a"}, {"name": "a"}], "different names, not a, a"),
        ([{"name": "a", "device": "l4"}], "pool a: cost: device is only for cost 'roofline'"),
        ([{"name": "a", "role": "decode"}], "need a router that moves KV cache, as disaggregated, not round_robin"),
        ([{"name": "a", "policies": {"router": "random"}}], "one router before all pools"),
    ],
)
def test_pools_that_make_no_sense_are_refused_in_one_line(pools: list, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec(pools=pools)


def test_a_pool_for_each_phase_is_needed_and_a_cluster_has_replicas_or_pools_and_is_simulated() -> None:
    mover = {"router": "disaggregated"}
    with pytest.raises(SpecError, match="no pool does decode"):
        spec(pools=[{"name": "a", "role": "prefill"}], policies=mover)
    with pytest.raises(SpecError, match="replicas or pools, not both"):
        spec(pools=POOLS, replicas=3)
    for other in ({"pools": POOLS}, {"policies": {"autoscaler": "slo"}}):
        with pytest.raises(SpecError, match="for simulations so far"):
            check_servable(spec(**other))


def test_blocks_and_lag_are_the_same_in_all_pools_and_a_start_takes_a_known_time(tmp_path: Path) -> None:
    for limits in ({"block_size": 32}, {"lag": 0}):
        with pytest.raises(SpecError, match="must be the same in all pools"):
            run_simulated(spec(pools=[{"name": "a"}, {"name": "b", "limits": limits}]), tmp_path / "run")
    with pytest.raises(SpecError, match="cold_start_s: say how long"):
        run_simulated(spec(policies={"autoscaler": "slo"}), tmp_path / "run")


def test_a_flag_says_a_pool() -> None:
    text = "p,replicas=2,role=prefill,device=h200,limits.max_num_seqs=64,policies.scheduler=sarathi/chunk_size=512"
    assert read_pool(text) == {
        "name": "p",
        "replicas": 2,
        "role": "prefill",
        "device": "h200",
        "limits": {"max_num_seqs": 64},
        "policies": {"scheduler": "sarathi,chunk_size=512"},
    }
    with pytest.raises(ValueError, match="write NAME,FIELD=VALUE"):
        read_pool("p,replicas")
    for text in ("p,limits.lag=[1", "p,limits=4,limits.lag=1"):
        with pytest.raises(ValueError, match=r"write it as limits\.max_num_seqs=64"):
            read_pool(text)


def test_the_command_simulates_pools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "simulate -w chat -n 12 --rate 9 --set workload.length_scale=0.05 --set limits.num_blocks=200"
    pools = ("--pool", "p,device=h200,role=prefill", "--pool", "d,device=l4,role=decode")
    status, _, err = diptych(
        monkeypatch, capsys, *words.split(), "--router", "disaggregated", *pools, "-o", str(tmp_path / "run")
    )
    assert (status, err) == (0, "")
    run = read_run(tmp_path / "run")
    assert [pool["cost"]["device"]["name"] for pool in run.pools] == ["h200", "l4"]
    assert (run.requests["moves"].map(len) > 0).any()
