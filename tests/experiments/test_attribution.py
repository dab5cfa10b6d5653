"""Errors of a simulation are ascribed to what they come from: in records whose errors are made on purpose."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.attribution import QUEUEING, Attribution, attribute, can_attribute
from experiments.records import read_run
from policies.shapes import StepShape
from simulator.costs.base import CostModel, StepCost
from simulator.costs.calibration import ModeFit, Slope, SwapFit
from simulator.costs.fitted import FittedCost
from tests.experiments.command import diptych
from tests.experiments.test_fidelity_simulated import LIMITS, MEASURED, record


def priced(fit: ModeFit | None, step: float) -> ModeFit:
    """A fit with prices that are set: what solving for them shares out between sizes that grow together may differ from
    one processor to another. Attention is up to a fifth of a step."""
    assert fit is not None
    device = dict.fromkeys(fit.device, 0.0) | {"step": step, "chunk_pairs": 15.0, "chunk_context": 200.0}
    curves = {"padded_tokens": [Slope(above=0, ns=1_000.0)], "max_context": [Slope(above=0, ns=0.0)]}
    curves |= {"decode_context": [Slope(above=0, ns=1_000.0)], "context_by_size": [Slope(above=0, ns=0.0)]}
    return fit.model_copy(update={"device": device | {"num_samples": 500.0}, **curves})


FITTED = MEASURED.calibration
KNOWN = FittedCost(
    FITTED.model_copy(update={"decode": priced(FITTED.decode, 2_000_000.0), "other": priced(FITTED.other, 3_000_000.0)})
)


class Off:
    """The cost model, with one part of its times changed."""

    def __init__(self, host: float = 1.0, **factors: float) -> None:
        self._host, self._factors = host, factors

    def cost(self, shape: StepShape) -> StepCost:
        cost = KNOWN.cost(shape)
        device = sum(ns * self._factors.get(name, 1.0) for name, ns in KNOWN.device_terms(shape).items())
        return StepCost(round(cost.prepare_ns * self._host), round(device), round(cost.finish_ns * self._host))

    def step_ns(self, shape: StepShape) -> int:
        return self.cost(shape).total_ns

    def inside(self, shape: StepShape) -> bool:
        return True

    def describe(self) -> dict[str, object]:
        return {"kind": "constant", "ns": 1}


def found_for(costs: CostModel, folder: Path, seconds: float = 1.5) -> Attribution:
    record(folder / "real", seconds, costs)
    record(folder / "sim", seconds, KNOWN)
    return attribute(read_run(folder / "real"), read_run(folder / "sim"), KNOWN)


def test_a_simulation_without_errors_has_none_to_ascribe(tmp_path: Path) -> None:
    found = found_for(KNOWN, tmp_path)
    assert set(found.terms.values()) == {0.0}
    assert all(kind.bias == 0 for kind in found.kinds)
    assert sum(kind.share for kind in found.kinds) == pytest.approx(1)
    assert all(share == pytest.approx(0) for name in found.latencies for share in found.shares(name).values())
    assert found.different_limits == []
    assert found.preemptions[0] == found.preemptions[1]


@pytest.mark.parametrize("term", ["products", "attention"])
def test_a_price_that_is_too_low_is_named(term: str, tmp_path: Path) -> None:
    found = found_for(Off(**{term: 1.2}), tmp_path)
    assert min(found.terms, key=lambda name: found.terms[name]) == term
    assert found.terms[term] < 0.7 * sum(found.terms.values()) < -0.01
    assert abs(found.terms["other"]) < 0.1 * abs(found.terms[term])


def test_a_host_that_is_slower_than_meant_is_named(tmp_path: Path) -> None:
    found = found_for(Off(host=20.0), tmp_path)
    assert found.terms["host"] < -0.1
    assert found.terms["host"] == pytest.approx(sum(found.terms.values()), rel=1e-6)
    assert {step.term for step in found.steps} == {"host"}


def test_the_parts_are_those_of_the_whole_error_and_of_a_queue_that_grows_most_are_the_queues(tmp_path: Path) -> None:
    found = found_for(Off(products=1.2, attention=1.2), tmp_path)
    frames = [read_run(tmp_path / name).requests.sort_values("request_id") for name in ("real", "sim")]
    for latency, column in (("ttft", "first_token_ns"), ("e2el", "finish_ns")):
        means = [float((frame[column] - frame["arrival_ns"]).mean()) / 1e6 for frame in frames]
        assert found.latencies[latency]["real"] == pytest.approx(means[0])
        assert found.shares(latency)["error"] == pytest.approx(means[1] / means[0] - 1)
    # By hand: the request that is off most, from the steps that ended in its time, if each had taken what is predicted.
    worst = found.requests[0]
    steps = read_run(tmp_path / "real").steps.set_index("step")
    assert worst.given_plans_ms < 0
    row = frames[0].set_index("request_id").loc[worst.request_id]
    first, last = worst.steps
    assert steps.loc[first, "end_ns"] > row["arrival_ns"]
    assert steps.loc[last, "end_ns"] == row["finish_ns"]
    assert worst.real_ms == (row["finish_ns"] - row["arrival_ns"]) / 1e6
    assert found.shares("ttft")[QUEUEING] < 2 * sum(
        share for name, share in found.shares("ttft").items() if name not in (QUEUEING, "error")
    )


def test_the_terms_of_the_device_are_all_of_its_time() -> None:
    swap = SwapFit(num_samples=9, copies=1000.0, swapped_out=30.0, swapped_in=70.0)
    costs = FittedCost(FITTED.model_copy(update={"swap": swap}))
    draw = np.random.default_rng(0)
    for _ in range(200):
        decodes, chunks = int(draw.integers(0, 9)), int(draw.integers(0, 3))
        shape = StepShape(
            num_decodes=decodes, decode_context=decodes * int(draw.integers(1, 900)), num_chunks=chunks,
            chunk_tokens=64 * chunks, chunk_pairs=4096 * chunks, chunk_context=99 * chunks, max_context=900,
            num_samples=decodes + chunks, padded_tokens=128, graph=bool(draw.integers(0, 2)),
            swapped_out=int(draw.integers(0, 2)) * 64, swapped_in=int(draw.integers(0, 2)) * 32,
        )  # fmt: skip
        assert sum(costs.device_terms(shape).values()) == pytest.approx(costs.cost(shape).device_ns, abs=0.51)


def test_compare_shows_it_for_a_simulation_of_a_real_run_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    record(tmp_path / "a", 1.5, Off(attention=1.2))
    record(tmp_path / "sim", 1.5, KNOWN)
    shutil.copytree(tmp_path / "a", tmp_path / "real")
    info = json.loads((tmp_path / "real" / "run.json").read_text())
    (tmp_path / "real" / "run.json").write_text(json.dumps({**info, "kind": "real"}))
    assert can_attribute(read_run(tmp_path / "real"), read_run(tmp_path / "sim"))
    assert not can_attribute(read_run(tmp_path / "a"), read_run(tmp_path / "sim"))
    args = ("compare", str(tmp_path / "real"), str(tmp_path / "sim"), "--json", str(tmp_path / "c.json"))
    status, out, _ = diptych(monkeypatch, capsys, *args)
    assert status == 0
    assert "Where the simulation's errors come from" in out
    assert "limits are alike" in out
    written = json.loads((tmp_path / "c.json").read_text())["attribution"]
    found = attribute(read_run(tmp_path / "real"), read_run(tmp_path / "sim"))
    assert written == json.loads(json.dumps(found.as_dict()))
    status, out, _ = diptych(monkeypatch, capsys, "compare", str(tmp_path / "a"), str(tmp_path / "sim"))
    assert status == 0
    assert "come from" not in out


def test_nothing_is_ascribed_where_every_step_begins_on_an_idle_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    limits = replace(LIMITS, lag=0, plan_lead_ns=None)
    record(tmp_path / "real", 1.5, Off(attention=1.2), limits)
    record(tmp_path / "sim", 1.5, KNOWN, limits)
    path = tmp_path / "real" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "real"}))
    args = ("compare", str(tmp_path / "real"), str(tmp_path / "sim"), "--json", str(tmp_path / "c.json"))
    status, out, _ = diptych(monkeypatch, capsys, *args)
    assert status == 0
    assert "come from" not in out
    assert "attribution" not in json.loads((tmp_path / "c.json").read_text())
