"""The host tier from a specification to a run's records, figures and replay, in both panels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from experiments.divergence import diff_decisions
from experiments.metrics import summarize
from experiments.profiling import profile
from experiments.real import load, real_limits, run_real
from experiments.records import Run, read_run
from experiments.records.earlier import with_squares
from experiments.replaying import replay_run
from experiments.simulated import make_costs, run_simulated, simulated_limits
from experiments.spec import CostSpec, RunSpec, SpecError, check_spec
from experiments.workloads import Workload
from policies.records import ADDED
from simulator.costs import FittedCost
from tests.experiments.command import diptych
from tests.experiments.replayed import check_replay
from tests.experiments.test_replay import _workload

CONSTANT = {"kind": "constant", "step_ms": 2, "swap_ns_per_token": 500}


def spec(lag: int = 1, preemption: str = "last_admitted,mode=swap", **more: Any) -> RunSpec:
    limits = {
        "num_blocks": 24,
        "num_host_blocks": 40,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 64,
        "max_model_len": 200,
        "lag": lag,
        **more.pop("limits", {}),
    }
    return check_spec(
        {
            "workload": {"name": "fixed", "n": 1},
            "model": {"source": "tiny", "load_format": "dummy"},
            "policies": {"preemption": preemption, **more.pop("policies", {})},
            "limits": {name: value for name, value in limits.items() if value is not None},
            **more,
        }
    )


def check(run: Run, folder: Path) -> None:
    check_replay(run, folder)
    preempted = run.decisions[run.decisions["kind"] == "preempt"]
    assert "swap" in set(preempted["reason"])
    assert run.limits["num_host_blocks"] == 40
    figures = summarize(run)
    assert figures["swapped_blocks_out"] == run.steps["swapped_out"].sum() / 16 > 0
    assert 0 < figures["swapped_blocks_in"] <= figures["swapped_blocks_out"]
    assert run.steps["num_swapped"].max() > 0
    assert run.steps["free_host_blocks"].iloc[-1] == 40


@pytest.mark.parametrize(("lag", "caching"), [(0, True), (1, False)])
def test_a_real_run_with_swaps_replays_without_a_divergence(lag: int, caching: bool, tmp_path: Path) -> None:
    given = spec(lag, limits={"prefix_caching": caching})
    run_real(given, tmp_path / "real", workload=_workload(3), check=True)
    check(read_run(tmp_path / "real"), tmp_path / "replay")


def test_a_run_that_swaps_what_is_cheaper_replays_with_the_same_costs(tmp_path: Path) -> None:
    given = spec(1, "cheapest", cost=CONSTANT, limits={"prefix_caching": False})
    run_real(given, tmp_path / "real", workload=_workload(3), check=True)
    check(read_run(tmp_path / "real"), tmp_path / "replay")
    run_simulated(given, tmp_path / "sim", workload=_workload(3), check=True)
    check(read_run(tmp_path / "sim"), tmp_path / "resim")


def test_runs_with_prefixes_in_host_memory_replay_and_say_what_was_moved_in_both_panels(tmp_path: Path) -> None:
    """Four prompts again and again, more than the device has room for."""
    shared = [tuple(range(100 * (i % 4), 100 * (i % 4) + 6)) for i in range(24)]
    output = [3 + i % 5 for i in range(24)]
    workload = Workload(
        [40_000_000 * (i // 4) for i in range(24)], [96 + i % 9 for i in range(24)], output, output, hash_ids=shared,
        hash_block=16,
    )  # fmt: skip
    given = spec(
        policies={"offload": "write_back,ahead=true"}, cost=CONSTANT, limits={"num_blocks": 18, "max_model_len": 150}
    )
    run_real(given, tmp_path / "real", workload=workload, check=True)
    run_simulated(given, tmp_path / "sim", workload=workload, check=True)
    for name in ("real", "sim"):
        run = read_run(tmp_path / name)
        check_replay(run, tmp_path / f"{name}-replay")
        figures, steps = summarize(run), run.steps
        moved = (steps["swapped_out"] - steps["offloaded"]).sum() // 16
        assert figures["swapped_blocks_out"] == moved
        assert figures["offloaded_blocks"] == steps["offloaded"].sum() // 16 > 0
        assert figures["copy_out_ms"] * 1e6 == pytest.approx(steps["copy_out_ns"].sum())
        assert (steps["copy_wait_ns"] <= steps["copy_out_ns"] + steps["copy_in_ns"]).all()
        assert figures["fetched_token_share"] == run.requests["fetched_tokens"].sum() / workload.prompt_tokens.sum()
        held = steps["free_host_blocks"] + steps["idle_host_blocks"]
        assert held.iloc[-1] == 40
        assert (run.requests["fetched_tokens"] <= run.requests["cached_tokens"]).all()


def test_a_run_of_an_earlier_version_reads_as_one_of_this_one(tmp_path: Path) -> None:
    """It had no host tier, no counts of names and look-ups, which are not worked out, and no sums of squares: those of
    the steps of several chunks are in the decisions."""
    run_simulated(spec(cost=CONSTANT, limits={"num_host_blocks": 0}), tmp_path / "sim", workload=_workload(3))
    path = tmp_path / "sim" / "steps.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(list(ADDED["steps"])), path)
    info = json.loads((tmp_path / "sim" / "run.json").read_text())
    del info["limits"]["num_host_blocks"]
    (tmp_path / "sim" / "run.json").write_text(json.dumps(info))
    run = read_run(tmp_path / "sim")
    names = ["num_named", "named_blocks", "looked_up_blocks"]
    assert all(table[name].to_numpy().any() for name in names)
    assert run.table("steps").drop_columns(names).equals(table.drop_columns(names))
    assert not run.steps[names].any(axis=None)
    assert summarize(run)["swapped_blocks_out"] == 0
    replay_run(run, tmp_path / "replay")
    assert diff_decisions(run, read_run(tmp_path / "replay")) is None
    several = (run.steps["num_chunks"] > 1).to_numpy()
    guessed = with_squares(run.table("steps"), None)["chunk_squares"].to_numpy()
    assert several.any()
    assert (guessed == run.steps["chunk_squares"])[~several].all(), "without decisions too"


def test_host_memory_is_given_in_blocks_or_in_gibibytes() -> None:
    gib = spec(limits={"num_host_blocks": None, "host_memory_gib": 0.25})
    loaded = load(gib.model)
    # tiny: 2 layers, 2 KV heads of 16, float32: 512 bytes a token, 8 KiB a block
    assert real_limits(gib, loaded).num_host_blocks == 2**28 // 8192
    assert real_limits(spec(), loaded).num_host_blocks == 40
    assert real_limits(spec(limits={"num_host_blocks": None}), loaded).num_host_blocks == 0
    costs = make_costs(CostSpec())  # Llama-3.1-8B in bfloat16: 2 MiB a block
    assert simulated_limits(gib, costs).num_host_blocks == 128
    with pytest.raises(SpecError, match=r"only a roofline knows a block's bytes"):
        simulated_limits(gib, make_costs(CostSpec(**CONSTANT)))
    offloading = spec(policies={"offload": "write_back"}, limits={"num_host_blocks": None})
    with pytest.raises(SpecError, match="write_back keeps prefixes in host memory; give some with --host-memory GIB"):
        simulated_limits(offloading, costs)
    with pytest.raises(SpecError, match="give num_host_blocks or host_memory_gib, not both"):
        spec(limits={"host_memory_gib": 1})
    with pytest.raises(SpecError, match=r"blocks of host memory need 128\.0 GiB, and this machine has"):
        real_limits(spec(limits={"num_host_blocks": 2**24}), loaded)


def test_a_profile_with_host_memory_prices_swaps_and_a_simulation_without_that_price_is_refused() -> None:
    limits = {"prefix_caching": False, "num_blocks": 200}
    fitted = profile(spec(limits=limits), seconds=2.5)
    assert fitted.prices_swaps
    swap = fitted.calibration.swap
    assert swap is not None
    assert swap.num_samples >= 8
    assert simulated_limits(spec(limits={"num_host_blocks": None}), fitted).num_host_blocks == 40
    unpriced = FittedCost(fitted.calibration.model_copy(update={"swap": None}))
    with pytest.raises(SpecError, match="has not measured swapping; profile anew with --host-memory"):
        simulated_limits(spec(), unpriced)


def test_the_command_line_takes_host_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = "simulate -w fixed -n 12 --rate 1000 --set workload.prompt_tokens=64 --set workload.output_tokens=200"
    flags = "--set limits.num_blocks=64 --host-memory 1 --preemption last_admitted,mode=swap --out run"
    status, _, err = diptych(monkeypatch, capsys, *command.split(), *flags.split())
    assert status == 0, err
    assert summarize(read_run("run"))["swapped_blocks_out"] > 0
