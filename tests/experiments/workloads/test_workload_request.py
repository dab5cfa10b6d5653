"""The workload itself: what it refuses, how it is changed, and its file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.workloads import TraceError, Workload
from experiments.workloads.stats import ideal_hit_rate, index_of_dispersion
from policies.request import Slo


def small(**columns: Any) -> Workload:
    """Three requests at 0, 1 and 3 s."""
    defaults = {"arrival_ns": [0, 10**9, 3 * 10**9], "prompt_tokens": [10, 20, 30], "output_tokens": [4, 8, 2]}
    return Workload.build(**(defaults | columns))


TIMES = st.one_of(st.none(), st.integers(1, 2**62))
SLOS = st.one_of(st.none(), st.builds(Slo, TIMES, TIMES, TIMES, st.floats(0.1, 9), st.booleans()))


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    n = draw(st.integers(1, 8))
    blocks = draw(st.sampled_from([1, 3, 16]))

    def column(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=n, max_size=n))

    def maybe(value: Any) -> Any:
        return value if draw(st.booleans()) else None

    prompts, outputs = column(1, 200), column(1, 200)
    hash_ids = maybe(
        [tuple(draw(st.lists(st.integers(-(2**70), 2**70), max_size=-(-prompt // blocks)))) for prompt in prompts]
    )
    return Workload.build(
        sorted(column(0, 2**62)),
        prompts,
        outputs,
        max_tokens=[output + extra for output, extra in zip(outputs, column(0, 99), strict=True)],
        tenant=maybe(draw(st.lists(st.text(max_size=5), min_size=n, max_size=n))),
        session=maybe(column(-(2**63), 2**63 - 1)),
        turn=maybe(column(0, 50)),
        priority=maybe(column(-(2**31), 2**31 - 1)),
        declared_output=maybe(column(1, 200)),
        texts=maybe(draw(st.lists(st.text(max_size=9), min_size=n, max_size=n))),
        slo=maybe(draw(st.lists(SLOS, min_size=n, max_size=n))),
        hash_ids=hash_ids,
        hash_block=blocks if hash_ids is not None else 0,
        name=draw(st.text(max_size=9)),
        provenance={"source": "drawn", "steps": [{"step": "scale_time", "factor": draw(st.floats(0.1, 9))}]},
    )


@settings(max_examples=150, deadline=None)
@given(workloads(), st.sampled_from(["w.jsonl", "w.jsonl.gz"]))
def test_writing_and_reading_gives_an_equal_workload(workload: Workload, file: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        workload.to_jsonl(Path(folder) / file)
        assert Workload.from_jsonl(Path(folder) / file) == workload


def test_a_file_written_by_hand_needs_no_header_cap_or_order(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"arrival_ns": 7, "prompt_tokens": 20, "output_tokens": 3, "hash_ids": [1, 2]}\n\n'
        '{"arrival_ns": 5, "prompt_tokens": 9, "output_tokens": 8, "hash_ids": [1]}\n'
    )
    workload = Workload.from_jsonl(path)
    assert workload.name == "mine"
    assert workload.arrival_ns.tolist() == [5, 7]
    assert workload.max_tokens.tolist() == [8, 8]
    assert workload.hash_ids == [(1,), (1, 2)]
    assert workload.hash_block == 16


@pytest.mark.parametrize(
    ("slo", "message"),
    [
        ('{"ttft_ms": 5}', "slo ttft_ms: "),
        ('{"ttft_ns": "soon"}', "slo ttft_ns: "),
        ("7", "expected null or ttft_ns, tpot_ns, e2e_ns, value, droppable"),
    ],
)
def test_objectives_that_cannot_be_read_are_refused_with_their_line(tmp_path: Path, slo: str, message: str) -> None:
    path = tmp_path / "hand.jsonl"
    path.write_text(f'{{"arrival_ns": 0, "prompt_tokens": 1, "output_tokens": 1, "slo": {slo}}}\n')
    with pytest.raises(TraceError, match=message):
        Workload.from_jsonl(path)


def test_a_field_on_some_lines_only_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    line = '{"arrival_ns": 7, "prompt_tokens": 20, "output_tokens": 3%s}\n'
    path.write_text(line % "" + line % ', "turn": 1')
    with pytest.raises(TraceError, match=r"w.jsonl:2: a field 'turn' that the first line has not"):
        Workload.from_jsonl(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt_tokens": [10, 0, 30]}, "prompt_tokens of request 1 is 0; it must be at least 1"),
        ({"output_tokens": [1, 2, -3]}, "output_tokens of request 2 is -3"),
        ({"arrival_ns": [-1, 2, 3]}, "arrival_ns of request 0 is -1"),
        ({"max_tokens": [4, 7, 9]}, "request 1 would write 8 tokens past its cap of 7"),
        ({"prompt_tokens": [1, 2]}, "prompt_tokens has 2 values"),
        ({"prompt_tokens": [1.5, 2, 3]}, "prompt_tokens must hold whole numbers"),
        ({"prompt_tokens": [2**31, 2, 3]}, "prompt_tokens has values outside"),
        ({"tenant": ["a"]}, "tenant has 1 values"),
        ({"hash_ids": [(1, 2), (), ()], "hash_block": 10}, "request 0 has 2 hash_ids for 10 tokens"),
        ({"hash_ids": [(), (), ()]}, "hash_block is 0"),
    ],
)
def test_columns_that_make_no_sense_are_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**columns)


def test_arrivals_that_decrease_are_refused_by_the_class_and_sorted_by_build() -> None:
    backwards = {"arrival_ns": [5, 1, 1], "prompt_tokens": [7, 8, 9]}
    assert small(**backwards).prompt_tokens.tolist() == [8, 9, 7]  # equal times keep their order
    with pytest.raises(ValueError, match="must not decrease"):
        Workload(**backwards, output_tokens=[1, 1, 1], max_tokens=[1, 1, 1])  # type: ignore[arg-type]


def test_columns_cannot_be_written_and_do_not_follow_their_source() -> None:
    source = np.array([10, 20, 30])
    workload = small(prompt_tokens=source)
    source[0] = 99
    assert workload.prompt_tokens[0] == 10
    with pytest.raises(ValueError, match="read-only"):
        workload.prompt_tokens[0] = 1


def test_scaling_time_keeps_the_pattern_and_changes_the_rate() -> None:
    workload = small().scale_time(0.5)
    assert workload.arrival_ns.tolist() == [0, 5 * 10**8, 15 * 10**8]
    assert small().scale_rate(4.0).rate == pytest.approx(4.0)
    assert workload.provenance["steps"] == [{"step": "scale_time", "factor": 0.5}]


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf")])
def test_a_factor_that_is_not_positive_and_finite_is_refused(factor: float) -> None:
    for change in (small().scale_time, small().scale_rate, small().scale_lengths):
        with pytest.raises(ValueError, match="positive and finite"):
            change(factor)


def test_a_rate_of_requests_that_all_arrive_at_once_is_refused() -> None:
    with pytest.raises(ValueError, match="at one instant"):
        small(arrival_ns=[0, 0, 0]).scale_rate(1.0)


def test_scaling_lengths_rounds_and_keeps_the_least() -> None:
    scaled = small().scale_lengths(0.1, min=2)
    assert scaled.prompt_tokens.tolist() == [2, 2, 3]
    assert scaled.output_tokens.tolist() == [2, 2, 2]


@settings(max_examples=150, deadline=None)
@given(workloads(), st.floats(0.01, 4.0))
def test_scaling_lengths_keeps_who_shares_what(workload: Workload, factor: float) -> None:
    scaled = workload.scale_lengths(factor)
    assert scaled.hash_ids == workload.hash_ids
    if workload.hash_ids is not None:
        before = -(-workload.prompt_tokens // workload.hash_block)
        assert np.array_equal(-(-scaled.prompt_tokens // scaled.hash_block), before)


@settings(max_examples=150, deadline=None)
@given(workloads(), st.integers(2, 300), st.sampled_from(["cut", "drop"]))
def test_after_clipping_every_request_fits_the_context_even_at_its_cap(
    workload: Workload, limit: int, how: Any
) -> None:
    fits = workload.prompt_tokens + workload.output_tokens <= limit
    if how == "drop" and not fits.any():
        with pytest.raises(ValueError, match="no request is left"):
            workload.clip(limit, how)
        return
    clipped = workload.clip(limit, how)
    assert np.all(clipped.prompt_tokens.astype(np.int64) + clipped.max_tokens <= limit)
    if how == "drop":
        assert np.array_equal(clipped.output_tokens, workload.output_tokens[fits])
    else:
        assert np.array_equal(clipped.prompt_tokens[fits], workload.prompt_tokens[fits])
        assert np.array_equal(clipped.output_tokens, np.minimum(workload.output_tokens, limit - 1))


def test_clipping_cuts_the_end_of_a_prompt_and_its_blocks() -> None:
    workload = small(hash_ids=[(1,), (1, 2), (1, 2, 3)], hash_block=10).clip(20)
    assert workload.prompt_tokens.tolist() == [10, 12, 18]
    assert workload.hash_ids == [(1,), (1, 2), (1, 2)]
    assert workload.provenance["steps"] == [{"step": "clip", "max_model_len": 20, "how": "cut", "too_long": 2}]


def test_caps_are_the_largest_output_the_own_output_or_a_number_that_cuts() -> None:
    assert small().max_tokens.tolist() == [8, 8, 8]
    assert small().with_cap("exact").max_tokens.tolist() == [4, 8, 2]
    assert small().with_cap("exact").with_cap("largest").max_tokens.tolist() == [8, 8, 8]
    capped = small().with_cap(5)
    assert capped.max_tokens.tolist() == [5, 5, 5]
    assert capped.output_tokens.tolist() == [4, 5, 2]
    with pytest.raises(ValueError, match="'smallest'; it must be"):
        small().with_cap("smallest")  # type: ignore[arg-type]


def test_a_declared_length_without_error_is_the_true_one() -> None:
    exact, noisy = small().with_declared_output(0.0, seed=1), small().with_declared_output(1.0, seed=1)
    assert exact.declared_output is not None
    assert noisy.declared_output is not None
    assert exact.declared_output.tolist() == [4, 8, 2]
    assert noisy.declared_output.tolist() != [4, 8, 2]


def test_a_slice_takes_the_first_requests_of_every_column() -> None:
    part = small(tenant=["a", "b", "c"], hash_ids=[(1,), (), (2,)], hash_block=16).slice(2)
    assert part.prompt_tokens.tolist() == [10, 20]
    assert part.tenant == ["a", "b"]
    assert part.hash_ids == [(1,), ()]
    assert len(small().slice(99)) == 3


def test_new_arrivals_leave_the_requests_alone_and_depend_on_the_seed() -> None:
    poisson, again, other = (small().poisson_arrivals(2.0, seed) for seed in (3, 3, 4))
    assert poisson == again
    assert poisson != other
    assert poisson.prompt_tokens.tolist() == [10, 20, 30]
    assert poisson.arrival_ns[0] == 0


def test_the_hit_rate_stops_at_the_first_block_never_seen() -> None:
    # 2nd: block 1 hits, 9 is new, 3 (seen) no longer counts. 3rd: all hit, but its last block is partial.
    assert ideal_hit_rate([30, 30, 25], [(1, 2, 3), (1, 9, 3), (1, 2, 3)], 10) == pytest.approx(35 / 85)


def test_the_index_of_dispersion_is_zero_for_a_clock_and_large_for_clumps() -> None:
    clock = np.arange(0, 100) * 10**9
    assert index_of_dispersion(clock, 10) == 0.0
    clumps = np.sort(np.tile(np.arange(0, 100, 20) * 10**9, 50))
    assert index_of_dispersion(clumps, 10) == pytest.approx(25.0)


def test_describing_names_the_figures_of_a_workload() -> None:
    figures = small(hash_ids=[(1,), (1, 2), (3,)], hash_block=16).describe()
    assert figures["requests"] == 3
    assert figures["prompt_tokens"]["max"] == 30
    assert figures["span_s"] == 3.0
    assert figures["rate"] == pytest.approx(2 / 3)
    assert figures["ideal_hit_rate"] == pytest.approx(16 / 60)
