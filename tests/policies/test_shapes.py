"""Padding to captured batch sizes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from policies.shapes import (
    MAX_CAPTURED_CHUNKS,
    StepShape,
    default_capture_sizes,
    default_mixed_capture_sizes,
    padded_batch,
)


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
def test_steps_of_decodes_alone_are_padded_to_the_next_size_up(
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


def test_the_ladder_of_steps_with_chunks_gets_coarser_and_ends_at_the_budget_or_2048() -> None:
    assert default_mixed_capture_sizes(300) == (64, 128, 192, 256, 300)
    assert default_mixed_capture_sizes(8192)[-5:] == (1024, 1280, 1536, 1792, 2048)
    assert default_mixed_capture_sizes(40) == (40,)


@given(st.integers(0, 300), st.integers(1, 80), st.integers(0, 2500))
def test_steps_with_chunks_are_padded_to_the_next_of_their_own_sizes(decodes: int, chunks: int, more: int) -> None:
    ladder = default_mixed_capture_sizes(8192)
    tokens = decodes + chunks + more
    padded, graph = padded_batch(decodes, chunks, chunks + more, (), ladder)
    assert graph == (tokens <= 2048 and chunks <= MAX_CAPTURED_CHUNKS)
    assert padded == (min(size for size in ladder if size >= tokens) if graph else tokens)


def test_a_shapes_tokens_are_its_decodes_and_its_chunk_tokens() -> None:
    assert StepShape(num_decodes=3, chunk_tokens=40).num_tokens == 43
