"""What prefix caching costs a simulated host, and how its price is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from policies.prefix import block_keys
from policies.records import REQUESTS
from policies.replica_state import Limits
from policies.request import Request
from policies.shapes import StepShape
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs import FittedCost
from simulator.costs.calibration import LookupFit
from simulator.costs.fitting import fit
from simulator.costs.lookup_fit import MIN_LOOKUPS
from simulator.costs.samples import StepSample
from simulator.simulation import Simulation
from tests.policies.harness import Drive, Job, Log

FIDELITY = Path(__file__).parents[2] / "benchmarks" / "results" / "fidelity"
LIMITS = Limits(num_blocks=100, block_size=4, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=64)
PRICES = {"num_named": 70_000.0, "named_blocks": 2_500.0, "looked_up_blocks": 3_200.0}


def chunk(tokens: int, named: tuple[int, int] = (0, 0), looked_up: int = 0) -> StepShape:
    return StepShape(
        max_context=tokens, num_chunks=1, chunk_tokens=tokens, chunk_pairs=tokens * (tokens + 1) // 2,
        chunk_context=tokens, num_samples=1, padded_tokens=tokens, num_named=named[0], named_blocks=named[1],
        looked_up_blocks=looked_up,
    )  # fmt: skip


def measured(shape: StepShape, late: float = 1.0) -> StepSample:
    prepare = 500_000 + 200 * shape.chunk_tokens + sum(ns * getattr(shape, name) for name, ns in PRICES.items())
    return StepSample(shape, round(late * prepare), 1_000_000 + 8_000 * shape.chunk_tokens, 90_000)


PLAIN = [measured(chunk(16 * i)) for i in range(1, 40)]


def looking_up(count: int, noise: float = 0.0) -> list[StepSample]:
    random = np.random.default_rng(1)
    found = []
    for _ in range(count):
        named = int(random.integers(0, 5))
        shape = chunk(
            int(random.integers(1, 600)), (named, named * int(random.integers(1, 90))), int(random.integers(1, 200))
        )
        found.append(measured(shape, float(np.exp(noise * random.normal()))))
    return found


def test_a_step_says_whose_prompts_were_named_for_it_and_what_was_looked_up() -> None:
    prompts = [tuple(block_keys(range(100 * i, 100 * i + n), 4)) for i, n in enumerate((9, 30, 12))]
    jobs = [Job(9, 3, keys=prompts[0]), Job(30, 2, keys=prompts[1]), Job(12, 2, arrives=2, keys=prompts[2])]
    steps = Drive(LIMITS, StackSpec(), jobs).steps
    named = [(step.index, *step.shape[-3:-1]) for step in steps if step.shape.num_named]
    assert named == [(0, 2, 2 + 7), (2, 1, 3)]
    assert {step.index: step.shape.looked_up_blocks for step in steps if step.admitted} == {
        step.index: sum(request.num_prompt_tokens // 4 for request in step.admitted) for step in steps if step.admitted
    }
    assert sum(step.shape.looked_up_blocks for step in steps) == 2 + 7 + 3
    uncached = Drive(Limits(100, 4, 2, 16, 64, prefix_caching=False), StackSpec(), jobs).steps
    assert {step.shape[-3:] for step in uncached} == {(0, 0, 0)}


def test_what_was_named_before_a_step_that_runs_nothing_counts_with_the_next_that_does() -> None:
    keys = tuple(block_keys(range(12), 4))
    stack = StackSpec(scheduler="static,max_batch_size=2,form_timeout_ms=1000")
    steps = Drive(LIMITS, stack, [Job(12, 2, keys=keys), Job(12, 2, arrives=1, keys=keys)]).steps
    assert not steps[0].runs
    first = next(step for step in steps if step.runs)
    assert first.index > 0
    assert first.shape.num_named >= 1
    assert sum(step.shape.num_named for step in steps) == 2


def test_a_fit_finds_what_a_prompt_and_a_block_cost_and_leaves_the_other_prices_alone() -> None:
    plain, model = fit(PLAIN), fit([*PLAIN, *looking_up(60)])
    lookups = model.calibration.lookups
    assert lookups is not None
    assert {name: getattr(lookups, name) for name in PRICES} == pytest.approx(PRICES, rel=0.01)
    assert lookups.held_out < 0.001
    assert lookups.without > 0.2
    assert plain.calibration.lookups is None
    for shape in (chunk(100), chunk(555)):
        assert model.cost(shape) == pytest.approx(plain.cost(shape), rel=0.001)
    some = looking_up(1)[0]
    assert model.cost(some.shape).prepare_ns == pytest.approx(some.prepare_ns, rel=0.01)


def test_prices_are_found_under_noise_and_its_size_is_the_held_out_error() -> None:
    lookups = fit([*PLAIN, *looking_up(400, noise=0.2)]).calibration.lookups
    assert lookups is not None
    assert {name: getattr(lookups, name) for name in PRICES} == pytest.approx(PRICES, rel=0.25)
    assert 0.1 < lookups.held_out < 0.25 < lookups.without


def test_a_servers_rare_long_delays_are_not_taken_off_the_price_of_look_ups() -> None:
    serving = [replace(sample, serving=True) for sample in PLAIN * 4]
    late = [replace(one, prepare_ns=5 * one.prepare_ns) if i % 10 == 0 else one for i, one in enumerate(serving)]
    model = fit([*late, *looking_up(60)])
    lookups = model.calibration.lookups
    assert lookups is not None
    assert {name: getattr(lookups, name) for name in PRICES} == pytest.approx(PRICES, rel=0.02)
    assert model.cost(chunk(100)).prepare_ns > 1.3 * measured(chunk(100)).prepare_ns, "which are in the mean"


def test_too_few_steps_that_look_up_give_no_price() -> None:
    assert fit([*PLAIN, *looking_up(MIN_LOOKUPS - 1)]).calibration.lookups is None
    assert fit([*PLAIN, *looking_up(MIN_LOOKUPS)]).calibration.lookups is not None


def test_prices_of_look_ups_survive_their_file(tmp_path: Path) -> None:
    model = fit([*PLAIN, *looking_up(60)])
    model.save(tmp_path / "calibration.json")
    assert FittedCost.load(tmp_path / "calibration.json").calibration == model.calibration


@pytest.mark.parametrize("lag", [0, 1])
def test_a_simulated_request_waits_for_its_prompts_names_and_look_ups(lag: int) -> None:
    plain = fit(PLAIN)
    priced = LookupFit(num_samples=1, **PRICES, held_out=0.0, without=0.0)
    firsts = []
    for lookups in (None, priced):
        model, log = FittedCost(plain.calibration.model_copy(update={"lookups": lookups})), Log()
        limits = Limits(200, 16, 4, 512, 600, lag=lag)
        simulation = Simulation(limits, [StackSpec().build(block_size=16)], model, None, recorder=log, check=True)
        simulation.run([Arrival(Request(0, 0, 400, 3), 3, keys=tuple(block_keys(range(400), 16)))])
        firsts.append(dict(zip(REQUESTS, log.requests[0], strict=True))["first_token_ns"])
    assert firsts[1] - firsts[0] == 70_000 + 25 * (2_500 + 3_200)


@pytest.mark.parametrize("path", sorted(FIDELITY.glob("*/calibrations/*.json")), ids=lambda path: path.stem)
def test_a_stored_calibration_of_before_charges_nothing_for_look_ups(path: Path) -> None:
    model = FittedCost.load(path)
    assert model.calibration.lookups is None
    for shape in (chunk(700), chunk(64, (0, 0), 0)):
        busy = shape._replace(num_named=9, named_blocks=500, looked_up_blocks=300)
        assert model.cost(busy) == model.cost(shape)
