"""The end of a request, decided from its tokens."""

import pytest

from runtime.sampling.params import SamplingParams
from runtime.sampling.stop import (
    StopReason,
    check_stop,
    masked_below_min_tokens,
    text_token_ids,
)

EOS = (2, 3)


def stop_of(token: int, output: int, prompt: int = 10, limit: int = 100, **fields: object) -> StopReason | None:
    return check_stop(token, output, prompt, SamplingParams(**fields), EOS, limit)  # type: ignore[arg-type]


@pytest.mark.parametrize("eos", EOS)
def test_any_end_of_sequence_token_stops_without_a_detail(eos):
    assert stop_of(eos, 1) == StopReason("stop", None)


def test_a_stop_token_stops_and_is_named():
    assert stop_of(7, 1, stop_token_ids=(5, 7)) == StopReason("stop", 7)


def test_ignore_eos_goes_on_but_a_stop_token_still_stops():
    assert stop_of(2, 1, ignore_eos=True) is None
    assert stop_of(2, 1, ignore_eos=True, stop_token_ids=(2,)) == StopReason("stop", 2)


def test_the_end_of_sequence_comes_before_a_stop_token_and_both_before_the_length():
    assert stop_of(2, 4, max_tokens=4, stop_token_ids=(2,)) == StopReason("stop", None)
    assert stop_of(7, 4, max_tokens=4, stop_token_ids=(7,)) == StopReason("stop", 7)
    assert stop_of(8, 4, max_tokens=4, stop_token_ids=(7,)) == StopReason("length")


def test_max_tokens_is_reached_exactly():
    assert stop_of(9, 3, max_tokens=4) is None
    assert stop_of(9, 4, max_tokens=4) == StopReason("length")


def test_the_context_length_counts_the_prompt_and_holds_without_max_tokens():
    assert stop_of(9, 89, max_tokens=None) is None
    assert stop_of(9, 90, max_tokens=None) == StopReason("length")


def test_a_length_limit_holds_below_min_tokens():
    assert stop_of(9, 90, max_tokens=500, min_tokens=300) == StopReason("length")


def test_below_min_tokens_all_that_would_end_the_request_is_masked():
    assert masked_below_min_tokens(SamplingParams(stop_token_ids=(9, 2)), EOS) == ()
    assert masked_below_min_tokens(SamplingParams(min_tokens=1, stop_token_ids=(9, 2)), EOS) == (2, 3, 9)
    params = SamplingParams(min_tokens=1, stop_token_ids=(9,), ignore_eos=True)
    assert masked_below_min_tokens(params, EOS) == (9,)


def test_the_text_of_a_stop_token_is_left_out_unless_asked_for():
    hidden, shown = SamplingParams(), SamplingParams(include_stop_str_in_output=True)
    assert text_token_ids([4, 5], StopReason("stop", 5), hidden) == [4]
    assert text_token_ids([4, 5], StopReason("stop", 5), shown) == [4, 5]
    assert text_token_ids([4, 5], StopReason("length"), hidden) == [4, 5]
    assert text_token_ids([4, 5], None, hidden) == [4, 5]
