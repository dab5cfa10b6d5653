"""What swapping costs in a simulation, and how its price is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from policies.costing import prefill_ns, swap_ns
from policies.model_shape import ModelShape
from policies.preemption.cheapest import Cheapest
from policies.records import STEPS
from policies.replica_state import Limits
from policies.request import Request
from policies.shapes import StepShape
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs import ConstantCost, FittedCost, LinearCost, RooflineCost
from simulator.costs.fitting import fit
from simulator.costs.samples import StepSample
from simulator.devices import load_device
from simulator.simulation import Simulation
from tests.policies.harness import Log


@pytest.mark.parametrize("lag", [0, 1])
def test_a_simulated_run_takes_exactly_as_much_longer_as_its_copies_take(lag: int) -> None:
    limits = Limits(12, 4, 6, 32, 40, prefix_caching=False, lag=lag, num_host_blocks=20)
    ends = []
    for price in (0, 7):
        log = Log()
        stack = StackSpec(preemption="last_admitted,mode=swap").build(block_size=4)
        simulation = Simulation(limits, [stack], ConstantCost(1_000, price), None, recorder=log, check=True)
        end = simulation.run(Arrival(Request(i, 0, 8, 24), 24) for i in range(3))
        steps = [dict(zip(STEPS, row, strict=True)) for row in log.steps]
        swapped = sum(step["swapped_out"] + step["swapped_in"] for step in steps)
        ran = [step for step in steps if step["num_decodes"] or step["num_chunks"]]
        assert swapped > 0
        assert [step["device_ns"] for step in ran] == [
            1_000 + price * (step["swapped_out"] + step["swapped_in"]) for step in ran
        ]
        assert end == 1_000 * len(ran) + price * swapped
        ends.append((end, swapped))
    assert ends[1][0] - ends[0][0] == 7 * ends[1][1]
    assert ends[0][1] == ends[1][1]


def test_a_roofline_moves_swapped_kv_at_what_the_host_link_reaches() -> None:
    model, device = ModelShape.preset("llama-3.1-8b"), load_device("h100-sxm")
    cost = RooflineCost(model, device)
    shape = StepShape(num_decodes=8, decode_context=8000, max_context=1000, padded_tokens=8, num_samples=8)
    plain = cost.cost(shape).device_ns
    copied = 131_072 * 1600 / (0.82 * 64)  # bytes at 52.5 bytes a nanosecond
    for field in ("swapped_out", "swapped_in"):
        assert cost.cost(shape._replace(**{field: 1600})).device_ns - plain == pytest.approx(20_000 + copied, abs=1)
    both = shape._replace(swapped_out=1600, swapped_in=160)
    assert cost.cost(both).device_ns - plain == pytest.approx(40_000 + 1.1 * copied, abs=1)
    # Section 7.3 of the vLLM paper, for this model and card: the longer the context, the more swapping saves.
    gains = [prefill_ns(cost, n) / swap_ns(cost, n) for n in (2048, 8192, 32_768)]
    assert 1 < gains[0] < gains[1] < gains[2]
    assert Cheapest().needs_cost


def decodes(batch: int, context: int, out: int = 0, back: int = 0) -> StepSample:
    shape = StepShape(
        num_decodes=batch, decode_context=batch * context, max_context=context, num_samples=batch,
        padded_tokens=batch, swapped_out=out, swapped_in=back,
    )  # fmt: skip
    swap = (30_000 if out else 0) + (30_000 if back else 0) + 900 * out + 1_100 * back
    return StepSample(shape, 1000, 500_000 + 2_000 * batch + batch * context + swap, 500)


PLAIN = [decodes(n, context) for n in (1, 2, 4, 8, 16, 32) for context in (50, 400, 1500)]
SWAPS = [decodes(n, 300, out=64 * n) for n in (1, 3, 6, 12)] + [decodes(n, 300, back=64 * n) for n in (1, 3, 6, 12)]


def test_a_fit_finds_what_copies_cost_each_way_and_leaves_the_other_prices_alone() -> None:
    without, model = fit(PLAIN), fit([*PLAIN, *SWAPS])
    assert not without.prices_swaps
    assert model.prices_swaps
    swap = model.calibration.swap
    assert swap is not None
    assert swap.copies == pytest.approx(30_000, rel=0.02)
    assert (swap.swapped_out, swap.swapped_in) == pytest.approx((900, 1_100), rel=0.02)
    assert model.calibration.other == without.calibration.other
    assert model.calibration.held_out == without.calibration.held_out
    seen = decodes(5, 300, out=160)
    assert model.cost(seen.shape).device_ns == pytest.approx(seen.device_ns, rel=0.01)
    assert model.inside(seen.shape)
    assert not without.inside(seen.shape)
    again = FittedCost(type(model.calibration).model_validate(model.calibration.model_dump()))
    assert again.cost(seen.shape) == model.cost(seen.shape)


def test_noise_that_is_larger_than_a_copy_makes_copies_neither_dearer_nor_cheaper() -> None:
    """Every other step takes 30% more than it should, the others less; a small copy is 17% of its step."""
    noisy = []
    for i, (n, context) in enumerate((n, context) for n in (1, 2, 4, 8) for context in (200, 300, 400, 500)):
        for out, back in ((64 * n, 0), (0, 64 * n)):
            step = decodes(n, context, out, back)
            noisy.append(replace(step, device_ns=round(step.device_ns * (1.3 if (i + i // 4) % 2 else 0.7))))
    swap = fit([*PLAIN, *noisy]).calibration.swap
    assert swap is not None
    for tokens in (64, 512):
        assert swap.copies + swap.swapped_out * tokens == pytest.approx(30_000 + 900 * tokens, rel=0.02)
        assert swap.copies + swap.swapped_in * tokens == pytest.approx(30_000 + 1_100 * tokens, rel=0.02)


def test_a_calibration_from_before_there_was_swapping_is_still_one() -> None:
    dumped = fit(PLAIN).calibration.model_dump()
    del dumped["swap"]
    assert not FittedCost(fit(PLAIN).calibration.model_validate(dumped)).prices_swaps


def test_a_linear_cost_charges_each_token_that_is_copied() -> None:
    assert LinearCost(100, per_swapped_ns=2.5).step_ns(StepShape(swapped_out=40, swapped_in=4)) == 210
    with pytest.raises(ValueError, match="swap_ns_per_token must be"):
        ConstantCost(1, -1)
