"""The simulated half of a validation, on records whose simulation must be exact: those of simulations."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from experiments.divergence import diff_decisions
from experiments.fidelity.sim_half import FIGURES, evaluate
from experiments.fidelity.steps import busy_periods
from experiments.fidelity.tables import markdown, missed
from experiments.metrics import summarize
from experiments.records import RunError, compact_run, read_run
from experiments.replaying import replay_run
from experiments.simulated import run_simulated
from experiments.spec import check_spec
from experiments.workloads import Workload
from policies.replica_state import Limits
from simulator.costs.base import CostModel, StepCost
from simulator.costs.constant import ConstantCost
from simulator.costs.fitted import FittedCost
from tests.experiments.command import diptych
from tests.experiments.fake_run import fake_run
from tests.simulator.test_costs_fitted import EXACT

LIMITS = Limits(
    num_blocks=36,
    max_num_seqs=8,
    max_num_batched_tokens=128,
    max_model_len=300,
    prefix_caching=True,
    lag=1,
    capture_sizes=(1, 2, 4, 8),
)
ABOUT = {"model": "tiny", "dtype": "float32", "hardware": {"cpu": "made up"}}
MEASURED = FittedCost(
    EXACT.calibration.model_copy(update={"provenance": {**ABOUT, "limits": json.loads(json.dumps(asdict(LIMITS)))}})
)


def workload_of(count: int, seconds: float, seed: int = 0) -> Workload:
    """Requests that share their first block with others, and want more memory than there is."""
    draw = np.random.default_rng(seed)
    arrivals = np.sort(draw.integers(0, round(1e9 * seconds) + 1, count))
    ids = [(int(i),) for i in draw.integers(0, 4, count)]
    prompts, outputs = draw.integers(20, 150, count), draw.integers(1, 100, count)
    return Workload.build(arrivals, prompts, outputs, hash_ids=ids, hash_block=16)


def record(folder: Path, seconds: float, costs: CostModel = MEASURED, limits: Limits = LIMITS, **stack: str) -> None:
    cost = {"kind": "constant", "step_ms": 1}
    spec = check_spec({"target": "sim", "workload": {"name": "fixed", "n": 1}, "policies": stack, "cost": cost})
    run_simulated(spec, folder, workload=workload_of(40, seconds), costs=costs, limits=limits)


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the real half leaves it, whose real runs are simulations."""
    folder = tmp_path_factory.mktemp("validation")
    (folder / "calibrations").mkdir()
    MEASURED.save(folder / "calibrations" / "cpu.json")
    cells = {"chat~capacity~mixed~0": {}, "chat~0.85~mixed~0": {}, "chat~0.85~mixed~1": {}}
    cells |= {"chat~0.85~sjf~0": {"queue": "sjf"}, "chat~0.85~sarathi~0": {"scheduler": "sarathi,chunk_size=64"}}
    for name, stack in cells.items():
        record(folder / "scratch" / name, 0.0 if "capacity" in name else 1.5, **stack)
        compact_run(read_run(folder / "scratch" / name), folder / "runs" / name)
    return folder


def test_a_simulation_of_a_simulation_is_exact_in_every_figure_of_every_level(
    validation: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("validate", "--from", str(validation), "--processes", "1", "--strict")
    status, out, _ = diptych(monkeypatch, capsys, *args)
    assert status == 0
    found = json.loads((validation / "fidelity.json").read_text())
    assert len(found["cells"]) == 5
    assert not found["failed"]
    for cell in found["cells"].values():
        assert cell["decisions"]["identical"]
        assert cell["decisions"]["steps"] > 100
        assert cell["completed"] == cell["requests"] == 40
        assert cell["preemptions"][0] == cell["preemptions"][1]
        assert set(cell["figures"]) == set(FIGURES)
        assert all(real == simulated > 0 for real, simulated in cell["figures"].values())
        assert set(cell["per_request_p90"].values()) == {0.0}
        for clock in ("device", "step"):
            assert all(kind["mean"] == kind["bias"] == 0 for kind in cell["steps"][clock].values())
        assert cell["steps"]["host"]["prepare_us"][0] == pytest.approx(cell["steps"]["host"]["prepare_us"][1])
    assert found["cells"]["chat~capacity~mixed~0"]["preemptions"][0] > 0
    sustained = found["cells"]["chat~capacity~mixed~0"]["sustained"]
    assert sustained[0] == sustained[1] == found["capacities"]["chat"]
    assert set(found["cells"]["chat~0.85~mixed~1"]["floor"].values()) == {0.0}
    assert missed(found) == 0
    assert markdown(found) in out
    assert "5 of 5 runs decided alike" in out
    assert markdown(found).count("MISS") == 1  # where it says what that is


def test_a_slower_device_than_the_calibrations_is_seen_at_every_level(validation: Path, tmp_path: Path) -> None:
    shutil.copytree(validation / "calibrations", tmp_path / "calibrations")
    record(tmp_path / "runs" / "chat~0.85~mixed~0", 1.5, Slower())
    cell = evaluate(tmp_path)["cells"]["chat~0.85~mixed~0"]
    assert cell["decisions"]["identical"]
    assert cell["steps"]["device"]["all"]["bias"] == pytest.approx(1 / 1.25 - 1, abs=1e-6)
    assert all(error < -0.1 for error in (b / a - 1 for key, (a, b) in cell["figures"].items() if "throu" not in key))


class Slower:
    """The device of the calibration takes a quarter longer."""

    def cost(self, shape: object) -> StepCost:
        cost = MEASURED.cost(shape)  # type: ignore[arg-type]
        return cost._replace(device_ns=cost.device_ns * 5 // 4)

    def step_ns(self, shape: object) -> int:
        return self.cost(shape).total_ns

    def inside(self, shape: object) -> bool:
        return True

    def describe(self) -> dict[str, object]:
        return {"kind": "constant", "ns": 1}


def test_a_cell_that_cannot_be_evaluated_is_named_and_the_others_are_kept(validation: Path, tmp_path: Path) -> None:
    shutil.copytree(validation / "calibrations", tmp_path / "calibrations")
    shutil.copytree(validation / "runs" / "chat~0.85~mixed~0", tmp_path / "runs" / "chat~0.85~mixed~0")
    record(tmp_path / "runs" / "chat~0.85~sjf~0", 1.5, limits=replace(LIMITS, max_num_seqs=7))
    (tmp_path / "runs" / "chat~0.85~vtc~0").mkdir()
    (tmp_path / "runs" / "chat~0.85~vtc~0" / "run.json").write_text("{")
    (tmp_path / "failed.json").write_text('{"chat~0.85~edf~0": "the device was lost"}')
    found = evaluate(tmp_path)
    assert list(found["cells"]) == ["chat~0.85~mixed~0"]
    assert sorted(found["failed"]) == ["chat~0.85~edf~0", "chat~0.85~sjf~0", "chat~0.85~vtc~0"]
    assert found["failed"]["chat~0.85~sjf~0"].endswith("max_num_seqs is 7, the calibration's 8")
    assert missed(found) == 3
    assert "- MISS chat~0.85~edf~0: the device was lost" in markdown(found)


def test_a_run_on_a_card_that_was_not_profiled_is_named(validation: Path, tmp_path: Path) -> None:
    shutil.copytree(validation / "runs", tmp_path / "runs")
    found = evaluate(tmp_path)
    assert not found["cells"]
    assert all("ran on a card that was not profiled" in reason for reason in found["failed"].values())


@pytest.mark.parametrize("lead", [None, 2_000_000])
def test_busy_periods_are_timed_as_the_simulator_times_them(lead: int | None, tmp_path: Path) -> None:
    record(tmp_path / "run", 10.0, limits=replace(LIMITS, plan_lead_ns=lead))
    run = read_run(tmp_path / "run")
    periods = busy_periods(run, MEASURED)
    assert periods.predicted.tolist() == periods.measured.tolist()
    ran = run.steps[(run.steps["num_decodes"] > 0) | (run.steps["num_chunks"] > 0)]
    idle = int((ran["plan_ns"].to_numpy()[1:] > ran["end_ns"].to_numpy()[:-1] + 1_000_000).sum())
    assert len(periods.steps) == len(ran) - 1 - idle
    assert idle > 3


def test_a_busy_period_of_steps_of_one_length_has_that_length(tmp_path: Path) -> None:
    record(tmp_path / "run", 0.0, ConstantCost(4_000_000))
    periods = busy_periods(read_run(tmp_path / "run"), ConstantCost(5_000_000))
    assert set(periods.measured.tolist()) == {4e6}
    assert set(periods.predicted.tolist()) == {5e6}


@pytest.mark.parametrize("lag", [0, 1])
def test_a_compact_record_has_the_same_figures_and_replays_alike(lag: int, tmp_path: Path) -> None:
    record(tmp_path / "run", 1.5, limits=replace(LIMITS, lag=lag))
    run = read_run(tmp_path / "run")
    small = compact_run(run, tmp_path / "small")
    assert run.requests["cached_tokens"].sum() > 0
    assert {**summarize(small), "run": "run"} == summarize(run)
    assert diff_decisions(run, small) is None
    replay_run(small, tmp_path / "replay", check=True)
    assert diff_decisions(small, read_run(tmp_path / "replay")) is None
    sizes = [sum(path.stat().st_size for path in one.folder.iterdir()) for one in (run, small)]
    assert sizes[1] < 0.9 * sizes[0]


def test_a_run_that_was_cut_short_is_not_made_compact(tmp_path: Path) -> None:
    fake_run(tmp_path / "run", max_steps=20)
    (tmp_path / "run" / "parts").mkdir()
    with pytest.raises(RunError, match="was cut short; only a complete run is kept"):
        compact_run(read_run(tmp_path / "run"), tmp_path / "small")
    assert not (tmp_path / "small").exists()
