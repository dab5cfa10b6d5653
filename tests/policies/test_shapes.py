"""Padding to captured batch sizes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from policies.shapes import StepShape, default_capture_sizes, padded_batch


def test_the_ladder_of_captured_sizes_is_one_two_four_then_eights_then_sixteens_and_the_largest() -> None:
    assert default_capture_sizes(40) == (1, 2, 4, 8, 16, 24, 32, 40)
    assert default_capture_sizes(3) == (1, 2, 3)
    assert default_capture_sizes(0) == ()
    assert default_capture_sizes(304)[-4:] == (256, 272, 288, 304)


@given(st.integers(0, 600))
def test_captured_sizes_ascend_and_stop_at_the_largest(largest: int) -> None:
    sizes = default_capture_sizes(largest)
    assert list(sizes) == sorted(set(sizes))
    assert all(1 <= size <= largest for size in sizes)
    assert not largest or sizes[-1] == largest


@given(st.integers(0, 300), st.integers(0, 3), st.integers(0, 500), st.integers(0, 280))
def test_only_steps_of_decodes_alone_are_padded_and_to_the_next_size_up(
    decodes: int, chunks: int, chunk_tokens: int, largest: int
) -> None:
    sizes = default_capture_sizes(largest)
    chunk_tokens = chunk_tokens + chunks if chunks else 0
    padded, graph = padded_batch(decodes, chunks, chunk_tokens, sizes)
    fitting = [size for size in sizes if size >= decodes]
    if decodes and not chunks and fitting:
        assert (padded, graph) == (fitting[0], True)
    else:
        assert (padded, graph) == (decodes + chunk_tokens, False)


def test_a_shapes_tokens_are_its_decodes_and_its_chunk_tokens() -> None:
    assert StepShape(num_decodes=3, chunk_tokens=40).num_tokens == 43
