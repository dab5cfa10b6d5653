"""Costs by definition."""

import json

import pytest

from policies.shapes import StepShape
from simulator.costs import ConstantCost, LinearCost, StepCost


def test_a_constant_cost_is_the_same_for_every_step() -> None:
    model = ConstantCost(1_000)
    for shape in (StepShape(), StepShape(num_decodes=9, padded_tokens=16, decode_context=900)):
        assert model.cost(shape) == StepCost(0, 1_000, 0)
        assert model.step_ns(shape) == 1_000
        assert model.inside(shape)


def test_a_linear_cost_prices_padded_tokens_and_the_context_of_decodes_and_chunks() -> None:
    model = LinearCost(base_ns=100, per_token_ns=10, per_context_ns=0.5)
    shape = StepShape(num_decodes=3, decode_context=40, num_chunks=1, chunk_tokens=5, chunk_context=20, padded_tokens=8)
    assert model.step_ns(shape) == 100 + 80 + 30
    assert model.cost(shape) == StepCost(0, 210, 0)


def test_a_linear_cost_is_rounded_to_the_nearest_nanosecond() -> None:
    assert LinearCost(0, per_context_ns=0.3).step_ns(StepShape(decode_context=5)) == 2
    assert LinearCost(0, per_context_ns=0.3).step_ns(StepShape(decode_context=4)) == 1


def test_negative_costs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        ConstantCost(-1)
    with pytest.raises(ValueError, match="whole number of nanoseconds"):
        ConstantCost(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="per_token_ns must be"):
        LinearCost(1, per_token_ns=-0.1)
    with pytest.raises(ValueError, match="base_ns must be"):
        LinearCost(float("inf"))


def test_descriptions_are_json_and_hold_the_numbers() -> None:
    assert json.loads(json.dumps(ConstantCost(5).describe())) == {"kind": "constant", "ns": 5, "swap_ns_per_token": 0}
    assert json.loads(json.dumps(LinearCost(5, 1, 2).describe()))["per_context_ns"] == 2
