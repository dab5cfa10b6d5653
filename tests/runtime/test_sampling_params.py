"""What a caller may ask of sampling, and what is refused."""

import dataclasses
import math

import pytest

from runtime.sampling.params import InvalidSamplingParams, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_k", 2**31),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", -2.5),
        ("frequency_penalty", 2.5),
        ("frequency_penalty", -math.inf),
        ("seed", 1.0),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 2**31),
        ("min_tokens", 17),
        ("stop", "word"),
        ("stop", ("a", "")),
        ("stop", (1,)),
        ("stop_token_ids", [1]),
        ("stop_token_ids", (-1,)),
        ("ignore_eos", 1),
        ("logprobs", -2),
        ("skip_special_tokens", None),
        ("include_stop_str_in_output", "yes"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name_and_value(field, value):
    with pytest.raises(InvalidSamplingParams) as error:
        SamplingParams(**{field: value})
    assert str(error.value).startswith(field)
    shown = value[0] if value == (-1,) else value
    assert str(shown) in str(error.value)


def test_several_greedy_continuations_are_refused():
    with pytest.raises(InvalidSamplingParams, match="n must be 1 when temperature is 0"):
        SamplingParams(n=2, temperature=0.0)


def test_the_ends_of_the_ranges_are_accepted():
    SamplingParams(temperature=2, top_k=-1, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2)
    SamplingParams(max_tokens=5, min_tokens=5, seed=-(2**63), logprobs=-1, n=3)
    assert SamplingParams(temperature=1e-6).greedy
    assert dataclasses.replace(SamplingParams(), temperature=0.0).greedy
