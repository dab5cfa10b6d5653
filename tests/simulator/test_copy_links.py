"""Copies to host memory and back beside the steps of a simulated replica: what is hidden, and what a step waits for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from policies.plan import BlockCopy, CopyTimes, Step
from policies.shapes import StepShape
from simulator.costs.base import StepCost
from simulator.costs.calibration import Calibration
from simulator.costs.fitted import FittedCost
from simulator.costs.fitting import fit
from simulator.costs.samples import StepSample
from simulator.pace import ComputedPace


@dataclass
class Cost:
    """100 ns a step, 2 ns a token copied out, 3 ns one copied in; the host takes no time."""

    overlaps_copies: bool = True

    def cost(self, shape: StepShape) -> StepCost:
        return StepCost(0, self.step_ns(shape), 0)

    def step_ns(self, shape: StepShape) -> int:
        return 100 + 2 * shape.swapped_out + 3 * shape.swapped_in

    def inside(self, shape: StepShape) -> bool:
        return True

    def describe(self) -> dict[str, object]:
        return {}


def step(index: int, out: tuple[int, ...] = (), back: tuple[int, ...] = ()) -> Step:
    """Host blocks of ten tokens each, copied out and in."""
    copies = [BlockCopy(None, way, hosts, hosts) for way, hosts in ((True, out), (False, back)) if hosts]
    shape = StepShape(num_decodes=1, swapped_out=10 * len(out), swapped_in=10 * len(back))
    return Step(index, 0, num_decodes=1, copies=copies, shape=shape)


def run(pace: ComputedPace, *launches: tuple[Step, int]) -> list[tuple[int, int, CopyTimes]]:
    for one, now in launches:
        pace.launch(one, now)
    found = [pace.end_of(one) for one, _ in launches]
    return [(timing.end_ns, timing.device_ns, timing.copies) for timing in found]


def test_nobody_waits_for_copies_out_and_those_in_are_hidden_behind_the_step_before() -> None:
    found = run(ComputedPace(Cost()), (step(0, out=(1, 2)), 0), (step(1, back=(5,)), 10), (step(2, back=(6, 7)), 190))
    assert found == [
        (190, 100, CopyTimes(40, 0, 0)),  # it ends at 100; the host comes to see it once it has launched the others
        (200, 100, CopyTimes(0, 30, 0)),  # from 10 to 40, while the first step still computes
        (350, 150, CopyTimes(0, 60, 50)),  # from 190 to 250: 10 of it hidden
    ]


def test_copies_queue_for_the_link_each_direction_for_itself() -> None:
    found = run(
        ComputedPace(Cost()), (step(0, back=tuple(range(10))), 0), (step(1, out=(20,), back=(11, 12)), 0), (step(2), 0)
    )
    assert found == [
        (400, 400, CopyTimes(0, 300, 300)),
        (500, 100, CopyTimes(20, 60, 0)),  # in from 300 to 360, behind the first step's
        (600, 100, CopyTimes()),
    ]


def test_what_is_fetched_waits_for_what_is_on_its_way_to_the_same_host_blocks() -> None:
    long = tuple(range(100))
    assert run(ComputedPace(Cost()), (step(0, out=long), 0), (step(1, back=(3,)), 5), (step(2, back=(200,)), 6)) == [
        (100, 100, CopyTimes(2000, 0, 0)),
        (2130, 2030, CopyTimes(0, 30, 1930)),  # out until 2000, in until 2030
        (2230, 100, CopyTimes(0, 30, 0)),
    ]


def test_without_overlap_a_step_takes_as_much_longer() -> None:
    found = run(ComputedPace(Cost(overlaps_copies=False)), (step(0, out=(1,), back=(5,)), 0), (step(1, back=(6,)), 0))
    assert found == [(150, 150, CopyTimes(20, 30, 50)), (280, 130, CopyTimes(0, 30, 30))]


@pytest.mark.parametrize("hidden", [True, False])
def test_a_fit_takes_prices_and_overlap_from_the_copies_own_times(hidden: bool) -> None:
    plain = [
        StepSample(StepShape(num_decodes=n, padded_tokens=n, num_samples=n), 1_000, 100_000 + 1_000 * n, 500)
        for n in range(1, 40)
    ]
    copying = []
    for n in range(16, 160, 16):
        for out, back in ((n, 0), (0, n)):
            took = 20_000 + 500 * out + 700 * back
            wait = 2_000 if hidden else took
            copies = CopyTimes(took if out else 0, took if back else 0, wait)
            shape = StepShape(num_decodes=4, padded_tokens=4, num_samples=4, swapped_out=out, swapped_in=back)
            copying.append(StepSample(shape, 1_000, 104_000 + wait, 500, copies=copies))
    fitted = fit([*plain, *copying])
    swap = fitted.calibration.swap
    assert swap is not None
    assert (swap.overlaps, fitted.overlaps_copies, swap.num_samples) == (hidden, hidden, len(copying))
    assert (swap.copies, swap.swapped_out, swap.swapped_in) == pytest.approx((20_000, 500, 700), rel=1e-3)
    again = FittedCost(Calibration.model_validate_json(fitted.calibration.model_dump_json()))
    assert again.overlaps_copies == hidden
