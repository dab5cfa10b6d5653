"""Step times drawn around a fit: errors as they were held out, the same for the same seed, a band over several."""

from __future__ import annotations

import json

import numpy as np
import pytest

from policies.replica_state import Limits
from policies.request import Request
from policies.shapes import StepShape
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.base import predicted
from simulator.costs.calibration import Calibration, CalibrationError, HeldOutError
from simulator.costs.drawn import DrawnCost, at, quantiles_of
from simulator.costs.fitted import FittedCost
from simulator.simulation import Simulation
from tests.simulator.test_costs_fitted import EXACT, NOISY, chunk, decodes


def with_errors(*errors: HeldOutError) -> FittedCost:
    return FittedCost(EXACT.calibration.model_copy(update={"held_out": list(errors)}))


def held_out(kind: str, quantiles: list[float], part: str = "device", **more: float) -> HeldOutError:
    figures = {"mean": 0.0, "p50": 0.0, "p90": 0.0, "bias": 0.0, **more}
    return HeldOutError(regime=kind, part=part, num_samples=9, quantiles=quantiles, **figures)


def errors_of(model: FittedCost, shape: StepShape, seeds: int = 1500) -> np.ndarray:
    """(predicted - measured) / measured, as drawn with many seeds."""
    fitted = model.cost(shape).device_ns
    return np.sort([fitted / DrawnCost(model, seed).cost(shape).device_ns - 1 for seed in range(seeds)])


def test_over_many_seeds_the_errors_of_a_step_have_the_held_out_quantiles_of_its_kind() -> None:
    known = [-0.3, -0.05, 0.0, 0.1, 0.4]
    model = with_errors(held_out("decode", known), held_out("prefill", [0.0, 0.0]), held_out("mixed", [0.5, 0.5]))
    drawn = errors_of(model, decodes(64, 400))
    assert np.quantile(drawn, [0.125, 0.25, 0.5, 0.75, 0.875]) == pytest.approx([-0.175, -0.05, 0, 0.1, 0.25], abs=0.03)
    assert known[0] - 1e-6 <= drawn[0] <= drawn[-1] <= known[-1] + 1e-6
    assert errors_of(model, chunk(500), 20) == pytest.approx(0, abs=1e-6)
    assert errors_of(model, chunk(500, batch=8), 20) == pytest.approx(0.5, rel=1e-5)


def test_a_draw_is_that_of_its_seed_and_of_like_steps_and_the_host_is_as_predicted() -> None:
    one, again, other = (DrawnCost(NOISY, seed) for seed in (1, 1, 2))
    shapes = [decodes(2**k, 300) for k in range(8)] + [chunk(37 * 2**k) for k in range(5)]
    assert [one.cost(s) for s in shapes] == [again.cost(s) for s in reversed(shapes)][::-1]
    assert sum(one.factor(s) != other.factor(s) for s in shapes) > len(shapes) / 2
    assert len({one.factor(s) for s in shapes}) > len(shapes) / 2
    assert one.factor(decodes(70, 300)) == one.factor(decodes(100, 301))
    for shape in shapes:
        plain, drawn = NOISY.cost(shape), one.cost(shape)
        assert (drawn.prepare_ns, drawn.finish_ns) == (plain.prepare_ns, plain.finish_ns)
        assert one.inside(shape) == NOISY.inside(shape)
    assert one.overlaps_copies == NOISY.overlaps_copies


def test_a_fit_without_error_is_drawn_as_it_predicts_and_so_measured_steps_come_back_as_measured() -> None:
    drawn = DrawnCost(EXACT, 7)
    for shape in (decodes(64, 400), decodes(1, 32), chunk(512)):
        assert drawn.cost(shape).device_ns == pytest.approx(EXACT.cost(shape).device_ns, rel=2e-3)


def test_a_fit_keeps_the_quantiles_of_its_held_out_errors() -> None:
    for error in NOISY.calibration.held_out:
        quantiles = np.array(error.quantiles)
        assert len(quantiles) == 41
        assert (np.diff(quantiles) >= 0).all()
        if error.regime == "decode" and error.part == "device":
            assert np.quantile(np.abs(quantiles), 0.5) == pytest.approx(error.p50, rel=0.3)


def test_a_calibration_of_an_earlier_version_is_drawn_by_the_size_of_its_errors() -> None:
    old = held_out("decode", [], p50=0.02, p90=0.06, bias=0.01)
    quantiles = quantiles_of(old)
    assert [quantiles[0], quantiles[10], quantiles[-1]] == pytest.approx([-0.08, 0.01, 0.10])
    assert [at(quantiles, share) - 0.01 for share in (0.05, 0.25, 0.75, 0.95)] == pytest.approx(
        [-0.06, -0.02, 0.02, 0.06]
    )
    content = json.loads(EXACT.calibration.model_dump_json())
    for error in content["held_out"]:
        del error["quantiles"]
    Calibration.model_validate(content)


def test_without_held_out_errors_nothing_can_be_drawn() -> None:
    with pytest.raises(CalibrationError, match="no held-out errors"):
        DrawnCost(with_errors(), 1)


def served_ns(costs: FittedCost | DrawnCost) -> int:
    simulation = Simulation(Limits(400, max_num_seqs=8), [StackSpec().build()], costs)
    assert simulation.replicas[0].cost is predicted(costs)  # policies are told the prediction
    return simulation.run(Arrival(Request(i, 0, 100, 60), 60) for i in range(12))


def test_several_seeds_give_a_band_around_the_prediction() -> None:
    model = with_errors(*(held_out(kind, [-0.1, -0.02, 0.02, 0.1]) for kind in ("decode", "prefill", "mixed")))
    alone = served_ns(model)
    band = [served_ns(DrawnCost(model, seed)) / alone for seed in range(12)]
    assert 0.89 < min(band) < 0.99 < 1.01 < max(band) < 1.12
    assert served_ns(DrawnCost(model, 3)) / alone == band[3]
