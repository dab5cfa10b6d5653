"""Every policy serves a real run in too little memory, and its replay decides alike in every step."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from experiments.divergence import diff_decisions
from experiments.real import load, run_real
from experiments.records import read_run
from experiments.replaying import replay_run
from experiments.spec import RunSpec, check_spec
from experiments.timeline import check_books
from experiments.workloads import Workload
from policies.registry import PolicyError
from policies.request import Slo
from policies.stack import StackSpec
from runtime.weights import LoadedModel
from tests.policies.library import EVERY, says

CALM = ("static", "reserve", "predicted_peak")
"""Policies that promise that nobody is preempted."""
SERVABLE = [stack for stack in EVERY if stack.eviction != "belady"]
"""Without the one that is told all block keys to come, which only a simulation knows."""


def _spec(stack: StackSpec) -> RunSpec:
    limits = {
        "num_blocks": 20,
        "num_host_blocks": 12,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 64,
        "max_model_len": 200,
        "lag": 1,
    }
    return check_spec(
        {
            "workload": {"name": "fixed", "n": 1},
            "model": {"source": "tiny", "load_format": "dummy"},
            "policies": asdict(stack),
            "limits": limits,
            "cost": {"kind": "constant", "step_ms": 2, "swap_ns_per_token": 500},
        }
    )


def _workload() -> Workload:
    """Requests of tenants, sessions and objectives that share prefixes and want more memory than there is."""
    n = 14
    draw = np.random.default_rng(11)
    prompts, outputs = draw.integers(20, 110, n), draw.integers(4, 60, n)
    shared = [tuple(range(draw.integers(0, 4))) for _ in prompts]
    return Workload.build(
        np.sort(draw.integers(0, 200_000_000, n)),
        prompts,
        outputs,
        max_tokens=outputs + draw.integers(0, 20, n),
        hash_ids=[tuple(i for i in ids if (i + 1) * 16 <= p) for ids, p in zip(shared, prompts, strict=True)],
        hash_block=16,
        priority=draw.integers(0, 3, n),
        tenant=[f"tenant-{k}" for k in draw.integers(0, 3, n)],
        session=draw.integers(0, 6, n),
        declared_output=draw.integers(1, 80, n),
        slo=[Slo(int(t) * 10**9, 10**9, droppable=t % 2 == 0) if t < 4 else None for t in draw.integers(1, 6, n)],
    )


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load(_spec(StackSpec()).model)


@pytest.mark.parametrize("stack", SERVABLE, ids=says)
def test_a_real_run_in_little_memory_replays_without_a_divergence(
    stack: StackSpec, tiny: LoadedModel, tmp_path: Path
) -> None:
    run_real(_spec(stack), tmp_path / "real", workload=_workload(), loaded=tiny, check=True)
    real = read_run(tmp_path / "real")
    assert set(real.requests["status"]) <= {"stop", "length", "dropped"}
    if not any(name in says(stack) for name in CALM):
        assert real.requests["preemptions"].sum() > 0
    if "swap" in says(stack) or "cheapest" in says(stack):
        assert real.decisions["reason"].isin(["swap"]).any()
    replay_run(real, tmp_path / "replay", check=True)
    replayed = read_run(tmp_path / "replay")
    assert diff_decisions(real, replayed) is None
    assert len(real.decisions) > 50
    assert real.steps.equals(replayed.steps)
    check_books(real)
    check_books(replayed)


def test_a_real_run_knows_no_future(tiny: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="only a simulation knows them"):
        run_real(_spec(StackSpec(eviction="belady")), tmp_path / "real", workload=_workload(), loaded=tiny)
