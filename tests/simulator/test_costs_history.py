"""What a step takes beside its own cost, against machines that slow down under load and hosts that are late."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from policies.plan import Step
from policies.shapes import StepShape
from simulator.costs import FittedCost
from simulator.costs.calibration import DelayFit, LoadFit
from simulator.costs.earlier import upgraded
from simulator.costs.features import DeviceFeatures
from simulator.costs.fitting import MIN_SERVING, fit
from simulator.costs.history import LoadMeter
from simulator.costs.history_fit import delays
from simulator.costs.samples import StepSample, samples_from_steps
from simulator.pace import ComputedPace
from tests.simulator.test_costs_fitted import steps

SIZES = (64, 128, 256, 512, 1024)
SLOWDOWN, CONSTANT_NS = 0.3, 50_000_000


def shape_of(tokens: int, longest: int = 0) -> StepShape:
    """One captured chunk, as long as the graph."""
    return StepShape(
        num_chunks=1, chunk_tokens=tokens, chunk_pairs=tokens * tokens // 2, chunk_context=tokens,
        max_context=longest or tokens, num_samples=1, padded_tokens=tokens, graph=True,
    )  # fmt: skip


def cold_ns(shape: StepShape) -> float:
    return 2_000_000 + 20_000 * shape.padded_tokens + 100 * shape.max_context


def throttled_samples(slowdown: float) -> list[StepSample]:
    """A device that is idle at times, and the slower the harder it worked; its load is kept by a list, not a sum."""
    random, now, past = np.random.default_rng(3), 0, [(0, 0, 0.0)]
    samples = []
    for i in range(520):
        shape = shape_of(int(random.choice(SIZES)), int(random.integers(1024, 1060)))
        if i % 40 == 0:
            now += int(random.integers(0, 200_000_000))
        load = sum(  # of each earlier stretch: its share, weighted by how long ago it was
            share * (np.exp(-(now - end) / CONSTANT_NS) - np.exp(-(now - start) / CONSTANT_NS))
            for start, end, share in past[-60:]
        )
        duration = round(cold_ns(shape) * (1 + slowdown * load))
        samples.append(StepSample(shape, 300_000, duration, 100_000, started_ns=now, serving=True))
        past.append((now, now + duration, shape.padded_tokens / cold_ns(shape) / FULL_RATE))
        now += duration
    return samples


@cache
def fitted_to_throttled() -> tuple[list[StepSample], FittedCost]:
    samples = throttled_samples(SLOWDOWN)
    return samples, fit(samples)


FULL_RATE = 1024 / cold_ns(shape_of(1024, 1200))


def test_a_device_that_slows_down_under_load_is_recognised_with_its_time_constant() -> None:
    model = fitted_to_throttled()[1]
    load, chunked = model.calibration.under_load, model.calibration.chunked
    assert load is not None
    assert chunked is not None
    assert load.time_constant_ns == CONSTANT_NS
    assert chunked.slowdown == pytest.approx(SLOWDOWN, abs=0.03)
    errors = [error for error in model.calibration.held_out if error.part == "device"]
    assert [error.regime for error in errors] == ["prefill"]
    assert errors[0].mean < 0.005


def test_a_simulation_of_a_throttled_device_takes_as_long_as_it_did() -> None:
    samples, model = fitted_to_throttled()
    history = model.history()
    assert history is not None
    predicted = []
    for sample in samples:
        cost, started = model.cost(sample.shape).device_ns, sample.started_ns or 0
        predicted.append(history.device_ns(sample.shape, cost, started))
        history.ran(sample.shape, cost, started, predicted[-1])
    measured = [sample.device_ns for sample in samples]
    assert sum(predicted) == pytest.approx(sum(measured), rel=0.002)
    assert predicted == pytest.approx(measured, rel=0.02)
    without = [model.cost(sample.shape).device_ns for sample in samples]
    assert without != pytest.approx(measured, rel=0.05)


def test_a_device_that_keeps_its_pace_has_no_slowdown() -> None:
    calibration = fit(throttled_samples(0.0)).calibration
    assert calibration.under_load is None


def test_load_falls_while_the_device_idles_and_rises_to_the_share_that_it_works_at() -> None:
    meter = LoadMeter(LoadFit(time_constant_ns=1_000, full_rate=2.0))
    assert meter.at(10) == 0
    meter.ran(StepShape(padded_tokens=1_000), 1_000, 0, 10**6)  # one token a nanosecond, for long
    assert meter.at(10**6) == pytest.approx(0.5)
    assert meter.at(10**6 + 1_000) == pytest.approx(0.5 / np.e)
    meter.ran(StepShape(padded_tokens=10_000), 1_000, 10**6, 10**6)  # more than can be
    assert meter.at(2 * 10**6) == pytest.approx(1.0)


# The host


def late_samples() -> list[StepSample]:
    """A host that is 4 ms late once in ten steps, else in time."""
    samples = []
    for i in range(1000):
        shape = StepShape(num_decodes=1 + i % 20, num_samples=1 + i % 20, padded_tokens=1 + i % 20, graph=True)
        samples.append(StepSample(shape, 500_000 + (4_000_000 if i % 10 == 0 else 0), 5_000_000, 100_000, serving=True))
    return samples


def test_the_mean_of_the_host_is_kept_though_rare_delays_are_outliers() -> None:
    samples = late_samples()
    model = fit(samples)
    predicted = sum(model.cost(sample.shape).prepare_ns for sample in samples)
    assert predicted == pytest.approx(sum(sample.prepare_ns for sample in samples), rel=1e-3)


def test_how_late_the_host_is_in_the_mean_depends_on_what_it_has_to_spare() -> None:
    model = fit(late_samples())
    history = model.history()
    assert history is not None
    # A step is meant to need 0.9 ms; in one of ten it needs 4.5: 3.6 ms more.
    for spare in (0, 800_000, 1_600_000, 3_200_000):
        assert history.delay_ns(spare) == pytest.approx(0.1 * (3_600_000 - spare), rel=0.05)
    assert history.delay_ns(10**8) == 0
    assert history.delay_ns(-1) == 0
    found = [history.delay_ns(spare) for spare in range(0, 30_000_000, 10_000)]
    assert all(a >= b >= 0 for a, b in pairwise(found))


def test_a_host_that_copies_kv_is_not_late_for_it() -> None:
    # Steps that swap take the host 2 ms longer: work of their own, which other steps do not wait for.
    plain = late_samples()
    swapping = [
        replace(sample, shape=sample.shape._replace(swapped_in=16 + i % 4), prepare_ns=sample.prepare_ns + 2_000_000)
        for i, sample in enumerate(plain)
    ]
    model = fit(plain)
    both = delays(model, [*plain, *swapping], MIN_SERVING)
    assert both is not None
    assert both == delays(model, plain, MIN_SERVING)
    assert delays(model, swapping, MIN_SERVING) is None


def test_a_simulated_device_waits_for_its_host_by_the_mean_delay() -> None:
    calibration = fit([replace(sample, serving=False) for sample in late_samples()]).calibration
    assert calibration.delay is None
    delay = DelayFit(spare_ns=[0, 10**9], mean_ns=[70_000.0, 70_000.0])
    ends = []
    for costs in (FittedCost(calibration), FittedCost(calibration.model_copy(update={"delay": delay}))):
        pace, shape = ComputedPace(costs), StepShape(num_decodes=1, num_samples=1, padded_tokens=1, graph=True)
        for index in range(2):
            pace.launch(Step(index, 0, shape=shape), 0)
        ends.append([pace.end_of(Step(index, 0, shape=shape)).end_ns for index in range(2)])
    assert ends[1][0] == ends[0][0]  # nothing to hide behind: the prepare time's mean has it
    assert ends[1][1] == ends[0][1] + 70_000


def test_a_step_that_is_coasted_takes_what_a_launched_one_takes() -> None:
    calibration = fitted_to_throttled()[1].calibration
    delay = DelayFit(spare_ns=[0, 10**9], mean_ns=[70_000.0, 70_000.0])
    costs = FittedCost(calibration.model_copy(update={"delay": delay}))
    one, other, now = ComputedPace(costs), ComputedPace(costs), 0
    for index in range(50):
        shape = shape_of(SIZES[index % 5], 1030)
        for horizon, watched in ((0.0, False), (float(now + 4_000_000 * (index % 2)), True)):
            assert one.coast(iter([shape]), 1, now, horizon, watched, False) == ([], False)  # nothing has changed
        (coasted,), _ = one.coast(iter([shape]), 1, now, float("inf"), True, False)
        step, plan = Step(index, 0, shape=shape), other.plan_at(index, now)
        assert plan is not None
        other.launch(step, plan)
        timing = other.end_of(step)
        assert coasted == (plan, timing.launch_ns, timing.end_ns, timing.device_ns)
        now = timing.end_ns
        other.reported(step, now)


def test_a_late_host_does_not_make_a_device_look_fast() -> None:
    columns = steps([(0, 10, 100, 90, 1), (20, 30, 300, 150, 1), (110, 120, 390, 90, 1)])
    # The second one's end was noticed 50 late; the host waited for the other two.
    assert [s.waited for s in samples_from_steps(columns)] == [True, False, True]
    shape = shape_of(64)
    exact = [StepSample(shape_of(64, longest), 1000, 3_000_000 + longest, 1000) for longest in range(64, 264)]
    late = [replace(sample, device_ns=sample.device_ns // 3, waited=False) for sample in exact for _ in range(3)]
    assert fit([*exact, *late]).cost(shape).device_ns == pytest.approx(3_000_064, rel=1e-3)


def test_serving_begins_when_it_is_said_to() -> None:
    columns = steps([(0, 10, 100, 90, 1), (105, 130, 300, 150, 1)])
    assert [s.serving for s in samples_from_steps(columns, serving_from_ns=105)] == [False, True]
    assert [s.serving for s in samples_from_steps(columns)] == [False, False]


# Features


def test_context_that_costs_differently_by_the_size_of_the_batch_is_recovered() -> None:
    random = np.random.default_rng(1)
    prices = {1: 90.0, 2: 20.0, 4: 60.0, 8: 30.0}

    def sample(size: int, context: int) -> StepSample:
        shape = StepShape(num_decodes=size, decode_context=context, max_context=context, padded_tokens=size, graph=True)
        return StepSample(shape, 0, round(1_000_000 + 50_000 * size + prices[size] * context), 0)

    model = fit([sample(size, int(context)) for size in prices for context in random.integers(100, 40_000, 120)])
    for size in prices:
        for context in (500, 5_000, 30_000):
            wanted = sample(size, context)
            assert model.cost(wanted.shape).device_ns == pytest.approx(wanted.device_ns, rel=0.01)


def test_the_named_curves_say_what_the_matrix_does() -> None:
    random = np.random.default_rng(2)
    shapes = [
        StepShape(
            num_decodes=int(n), decode_context=int(n) * int(c), max_context=2 * int(c), padded_tokens=int(2**k),
            num_samples=int(n), graph=True,
        )
        for n, c, k in zip(
            random.integers(1, 64, 300), random.integers(1, 3000, 300), random.integers(0, 7, 300), strict=True
        )
    ]  # fmt: skip
    features = DeviceFeatures(shapes, captured=True)
    matrix = features.matrix(shapes)
    solution = random.uniform(0, 100, matrix.shape[1])
    calibration = fit([StepSample(shape, 0, 10**6, 0) for shape in shapes]).calibration
    assert calibration.decode is not None
    named = calibration.decode.model_copy(update=features.named(list(solution)))
    model = FittedCost(calibration.model_copy(update={"decode": named}))
    assert [model.cost(shape).device_ns for shape in shapes] == pytest.approx(list(matrix @ solution), abs=1)


def test_a_recorded_calibration_of_the_first_format_costs_what_it_did() -> None:
    prices = {"step": 1000.0, "any_chunk": 50.0, "num_decodes": 7.0, "decode_context": 2.0, "max_context": 3.0}
    prices |= {"num_chunks": 11.0, "chunk_pairs": 0.5, "chunk_context": 4.0, "num_samples": 5.0}
    mode = {
        "num_samples": 20, "num_finish_samples": 20,
        "tokens": [{"above": 0, "ns": 10.0}, {"above": 8, "ns": 20.0}],
        "device": prices,
        "prepare": {"step": 100.0, "num_decodes": 1.0, "num_chunks": 2.0, "chunk_tokens": 3.0},
        "finish": {"step": 10.0, "num_samples": 2.0},
    }  # fmt: skip
    content = {"format": "diptych-calibration-1", "provenance": {}, "graph": mode, "eager": None}
    content |= {"swap": None, "ranges": [], "held_out": []}
    calibration = type(fit(late_samples()).calibration).model_validate(upgraded(content))
    shape = StepShape(3, 300, 150, 1, 6, 21, 6, 36, 4, 16, True)
    device = 1000 + 8 * 10 + 8 * 20 + 50 + 3 * 7 + 300 * 2 + 150 * 3 + 11 + 21 * 0.5 + 6 * 4 + 4 * 5
    assert FittedCost(calibration).cost(shape) == (100 + 3 + 2 + 18, round(device + 0.1), 10 + 8)
    assert upgraded(calibration.model_dump()) == calibration.model_dump()
