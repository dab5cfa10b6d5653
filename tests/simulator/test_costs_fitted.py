"""The fit against machines whose true prices are known."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.shapes import StepShape
from simulator.costs import FittedCost
from simulator.costs.calibration import CalibrationError
from simulator.costs.fitting import fit
from simulator.costs.samples import StepSample, samples_from_steps

CAPTURED = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (32, 100, 400, 1000, 3000)
Noise = Callable[[], float]


def exact() -> float:
    return 1.0


def decodes(batch: int, context: int, padded: int | None = None, longest: int | None = None) -> StepShape:
    return StepShape(
        num_decodes=batch,
        decode_context=batch * context,
        max_context=longest or context,
        num_samples=batch,
        padded_tokens=padded or batch,
        graph=True,
    )


def chunk(tokens: int, start: int = 0, batch: int = 0, context: int = 500) -> StepShape:
    return StepShape(
        num_decodes=batch,
        decode_context=batch * context,
        max_context=max(start + tokens, context if batch else 0),
        num_chunks=1,
        chunk_tokens=tokens,
        chunk_pairs=tokens * start + tokens * (tokens + 1) // 2,
        chunk_context=start + tokens,
        num_samples=batch + 1,
        padded_tokens=tokens + batch,
    )


def gemm_ns(tokens: int) -> float:
    """Bound by weights below 192 tokens, by arithmetic above."""
    return 2_000_000.0 + max(0, tokens - 192) * 9_000.0


def machine(shape: StepShape, noise: Noise = exact) -> StepSample:
    """A machine with prices like those of a small model on a GPU."""
    device = 300_000 + gemm_ns(shape.padded_tokens) + 40.0 * shape.decode_context + 500.0 * shape.num_samples
    device += 1.5 * shape.chunk_pairs + 20.0 * shape.chunk_context + 150.0 * shape.max_context
    if not shape.graph:
        device += 700_000
    prepare = 150_000 + 1_000 * shape.num_decodes + 20_000 * shape.num_chunks + 30 * shape.chunk_tokens
    finish = 80_000 + 4_000 * shape.num_samples
    return StepSample(shape, round(prepare * noise()), round(device * noise()), round(finish * noise()))


def grid() -> list[StepShape]:
    shapes = [decodes(batch, context) for batch in CAPTURED for context in CONTEXTS]
    shapes += [decodes(batch, context, longest=3 * context) for batch in CAPTURED for context in CONTEXTS[:3]]
    prompts = (16, 48, 96, 192, 300, 512, 1024, 2048)
    shapes += [chunk(tokens, start) for tokens in prompts for start in (0, 500, 2000)]
    shapes += [chunk(tokens, start, batch) for tokens in prompts for start in (0, 1000) for batch in (1, 17, 64)]
    return shapes


PROVENANCE = {"device": "a made-up one", "model": "tiny", "date": "2026-11-23"}
EXACT = fit([machine(shape) for shape in grid()], PROVENANCE)


def worst(model: FittedCost, shapes: list[StepShape]) -> float:
    """The largest relative error over host and device times."""
    errors = []
    for shape in shapes:
        true, cost = machine(shape), model.cost(shape)
        errors.append(abs(cost.device_ns / true.device_ns - 1))
        errors.append(abs(cost.prepare_ns / true.prepare_ns - 1))
        assert true.finish_ns is not None
        errors.append(abs(cost.finish_ns / true.finish_ns - 1))
    return max(errors)


UNSEEN = [decodes(11, 700, padded=16), decodes(200, 222, padded=256), chunk(150), chunk(700, 300), chunk(900, 0, 40)]


def test_exact_times_are_met_to_a_thousandth() -> None:
    assert worst(EXACT, grid()) < 1e-3


def test_sizes_between_the_measured_ones_are_interpolated() -> None:
    assert worst(EXACT, UNSEEN) < 0.02


def test_what_the_devices_time_is_made_of_sums_to_it() -> None:
    for shape in [*UNSEEN, decodes(1, 100)]:
        terms = EXACT.device_terms(shape)
        assert set(terms) == {"products", "attention", "sampling"}
        assert sum(terms.values()) == pytest.approx(EXACT.cost(shape).device_ns, abs=1)
    few, many = EXACT.device_terms(decodes(64, 100)), EXACT.device_terms(decodes(64, 3000))
    # 64 sequences, 2,900 more of context each, at 40 ns a token; the longest has as many more, at 150.
    assert many["attention"] - few["attention"] == pytest.approx(64 * 2_900 * 40 + 2_900 * 150, rel=0.02)
    assert many["products"] == pytest.approx(few["products"], rel=0.02)


def test_known_prices_are_recovered_from_noisy_times() -> None:
    random = np.random.default_rng(7)
    samples = [machine(shape, lambda: random.normal(1, 0.02)) for shape in grid() for _ in range(5)]
    model = fit(samples)
    assert worst(model, [*grid(), *UNSEEN]) < 0.06
    decode, other = model.calibration.decode, model.calibration.other
    assert decode is not None
    assert decode.decode_context[0].ns == pytest.approx(40, rel=0.05)
    assert decode.prepare["num_decodes"] == pytest.approx(1_000, rel=0.1)
    assert decode.finish["num_samples"] == pytest.approx(4_000, rel=0.1)
    assert other is not None
    assert other.device["chunk_pairs"] == pytest.approx(1.5, rel=0.2)


def test_a_few_steps_that_took_ten_times_as_long_hardly_move_the_fit() -> None:
    random = np.random.default_rng(3)
    samples = [machine(shape, lambda: random.normal(1, 0.01)) for shape in grid()]
    hit = [replace(sample, device_ns=10 * sample.device_ns) for sample in samples[::12]]
    samples[::12] = hit
    assert worst(fit(samples), [*grid(), *UNSEEN]) < 0.1


def test_noise_does_not_make_the_fit_come_out_low() -> None:
    random = np.random.default_rng(11)
    shapes = [chunk(*map(int, random.integers((1, 0, 1), (2000, 2000, 64)))) for _ in range(1500)]
    model = fit([machine(shape, lambda: float(random.uniform(0.5, 1.5))) for shape in shapes])
    true = sum(machine(shape).device_ns for shape in shapes)
    assert sum(model.cost(shape).device_ns for shape in shapes) == pytest.approx(true, rel=0.03)


def test_one_slow_step_among_the_largest_does_not_set_the_price_of_larger_ones() -> None:
    samples = [machine(chunk(tokens, start)) for tokens in (8, 40, 100, 200, 400, 402) for start in (0, 50, 300)]
    slow = [replace(s, device_ns=2 * s.device_ns) if s.shape.padded_tokens == 402 else s for s in samples]
    true = machine(chunk(600)).device_ns
    assert true / 2 < fit(slow).cost(chunk(600)).device_ns < 2.5 * true


def test_repeats_of_a_shape_count_as_their_median() -> None:
    samples = [machine(shape) for shape in grid() for _ in range(3)]
    spoilt = [replace(s, device_ns=s.device_ns * 50) if i % 3 == 1 else s for i, s in enumerate(samples)]
    assert fit(spoilt).calibration.decode == fit(samples).calibration.decode


def test_the_order_of_the_samples_does_not_matter() -> None:
    samples = [machine(shape) for shape in grid()]
    assert fit(samples[::-1], PROVENANCE).calibration == EXACT.calibration


def test_a_price_that_falls_a_token_is_followed_as_well_as_one_that_rises() -> None:
    # Concave: the first tokens cost more each than the later ones.
    def times(tokens: int) -> int:
        return 100_000 + 5_000 * min(tokens, 64) + 500 * max(0, tokens - 64)

    shapes = [chunk(tokens, start) for tokens in (1, 4, 16, 32, 64, 128, 256, 512) for start in (0, 100)]
    model = fit([StepSample(shape, 0, times(shape.padded_tokens), 0) for shape in shapes])
    for tokens in (2, 8, 50, 100, 400):
        assert model.cost(chunk(tokens)).device_ns == pytest.approx(times(tokens), rel=0.03)


LARGEST = {
    "num_decodes": 512,
    "decode_context": 10**6,
    "max_context": 10**5,
    "num_chunks": 16,
    "chunk_tokens": 8192,
    "chunk_pairs": 10**8,
    "chunk_context": 10**6,
    "num_samples": 512,
    "padded_tokens": 20_000,
}


@given(
    sizes=st.fixed_dictionaries({name: st.integers(0, largest) for name, largest in LARGEST.items()}),
    name=st.sampled_from(sorted(LARGEST)),
    more=st.integers(1, 10_000),
    graph=st.booleans(),
)
def test_no_cost_is_negative_and_none_falls_as_a_size_grows(
    sizes: dict[str, int], name: str, more: int, graph: bool
) -> None:
    if name == "num_chunks":  # a first chunk makes it a step of another kind
        sizes["num_chunks"] += 1
    small = StepShape(**sizes, graph=graph)
    size: Any = {name: sizes[name] + more}
    cost, larger = NOISY.cost(small), NOISY.cost(small._replace(**size))
    for part in ("prepare_ns", "device_ns", "finish_ns"):
        assert 0 <= getattr(cost, part) <= getattr(larger, part)
        assert isinstance(getattr(cost, part), int)
    assert NOISY.step_ns(small) == cost.prepare_ns + cost.device_ns + cost.finish_ns


def _pure_noise() -> FittedCost:
    random = np.random.default_rng(1)
    return fit([StepSample(s, *(int(v) for v in random.integers(1, 10**7, 3))) for s in grid()])


NOISY = _pure_noise()
"""Fitted to times that have nothing to do with the sizes: what the least squares would love to make negative."""


# Where the model knows what it does not know


def test_held_out_error_is_next_to_nothing_without_noise_and_covers_every_regime() -> None:
    errors = {(error.regime, error.part): error for error in EXACT.calibration.held_out}
    assert set(errors) == {(r, p) for r in ("decode", "prefill", "mixed") for p in ("device", "step")}
    for error in errors.values():
        assert error.p50 < 1e-3
        assert error.p50 <= error.p90
        assert abs(error.bias) < 0.02
    assert errors["decode", "device"].num_samples == 72  # each sample is held out once


def test_held_out_error_tells_the_noise_that_was_in_the_times() -> None:
    random = np.random.default_rng(5)
    samples = [machine(shape, lambda: random.normal(1, 0.05)) for shape in grid()]
    for error in fit(samples).calibration.held_out:
        if error.part == "device":
            # The mean absolute value of a normal variable is 0.8 of its deviation; a fit adds its own error.
            assert 0.025 < error.mean < 0.1


def test_shapes_outside_what_was_measured_are_flagged() -> None:
    assert EXACT.inside(decodes(20, 500, padded=32))
    assert EXACT.inside(chunk(500, 100, batch=20))
    assert not EXACT.inside(decodes(257, 100))  # more decodes
    assert not EXACT.inside(decodes(1, 40, longest=20_000))  # a longer sequence
    assert not EXACT.inside(chunk(4096))  # a longer chunk
    assert not EXACT.inside(decodes(20, 500)._replace(graph=False))  # decodes alone were never run eagerly
    assert not EXACT.inside(StepShape())


def test_mixed_steps_are_outside_where_only_decodes_and_prompts_were_measured() -> None:
    samples = [machine(shape) for shape in grid() if not (shape.num_chunks and shape.num_decodes)]
    model = fit(samples)
    assert model.inside(chunk(500, 100))
    assert not model.inside(chunk(500, 100, batch=20))


def test_steps_that_were_only_run_eagerly_price_graphs_too_but_those_are_outside() -> None:
    model = fit([machine(shape) for shape in grid() if not shape.graph])
    shape = chunk(500, 100, batch=20)
    assert model.cost(shape._replace(graph=True)) == model.cost(shape)
    assert not model.inside(shape._replace(graph=True))


def test_too_few_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 10 distinct shapes, not 1; profile more"):
        fit([machine(decodes(1, 100))] * 50)
    with pytest.raises(ValueError, match="at least 10 distinct shapes, not 0"):
        fit([])


def test_negative_times_are_refused() -> None:
    with pytest.raises(ValueError, match="less than no time"):
        fit([replace(machine(shape), prepare_ns=-1) for shape in grid()])


# Files


def test_a_calibration_survives_its_file_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    NOISY.save(path)
    loaded = FittedCost.load(path)
    assert loaded.calibration == NOISY.calibration
    assert all(loaded.cost(shape) == NOISY.cost(shape) for shape in [*grid(), *UNSEEN])
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_the_description_is_json_with_provenance_and_error() -> None:
    description = json.loads(json.dumps(EXACT.describe()))
    assert description["kind"] == "fitted"
    assert description["provenance"] == PROVENANCE
    assert {"regime", "part", "mean", "p50", "p90", "bias"} < set(description["held_out"][0])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "other", "format"),
        (["format"], "diptych-calibration-1", "of an earlier version; make it anew with `diptych profile`"),
        (["decode", "device", "num_decodes"], -1.0, "decode.device.num_decodes.*greater than or equal to 0"),
        (["decode", "device", "magic"], 1.0, "decode.device.*exactly the terms step, any_decode"),
        (["other", "padded_tokens"], [], "other.padded_tokens"),
        (["other", "padded_tokens"], [{"above": 3, "ns": 1.0}], "must begin at 0 and ascend"),
        (["other", "finish", "step"], "fast", "other.finish.step"),
        (["ranges", 0, "sizes", "num_decodes"], [1], "ranges.0.sizes.num_decodes"),
        (["surprise"], 1, "surprise"),
    ],
)
def test_a_file_that_was_tampered_with_is_refused_where_it_is_wrong(
    tmp_path: Path, path: list[str | int], value: object, message: str
) -> None:
    content = json.loads(json.dumps(EXACT.calibration.model_dump()))
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match=message) as error:
        FittedCost.load(file)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_one_that_is_not_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"none.json cannot be read \(No such file"):
        FittedCost.load(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(CalibrationError, match=r"text.json is not JSON"):
        FittedCost.load(tmp_path / "text.json")


def test_a_calibration_without_any_fit_is_refused() -> None:
    with pytest.raises(CalibrationError, match="neither decode, chunked nor other"):
        FittedCost(EXACT.calibration.model_copy(update={"decode": None, "other": None}))


# From the records of a run


def steps(rows: list[tuple[int, int, int, int, int]]) -> dict[str, list[object]]:
    """Columns of steps.parquet from (plan, launch, end, device, decodes)."""
    sizes = dict.fromkeys(("decode_context", "max_context", "num_chunks", "chunk_tokens", "chunk_pairs"), 0)
    sizes |= dict.fromkeys(("chunk_context", "chunk_squares", "num_samples", "padded_tokens"), 0)
    columns: dict[str, list[object]] = {name: [value] * len(rows) for name, value in sizes.items()}
    columns["graph"] = [True] * len(rows)
    for name, values in zip(
        ("plan_ns", "launch_ns", "end_ns", "device_ns", "num_decodes"), zip(*rows, strict=True), strict=True
    ):
        columns[name] = list(values)
    return columns


def test_finish_is_from_the_end_to_the_next_plan_and_unknown_after_the_last() -> None:
    samples = samples_from_steps(steps([(0, 5, 100, 90, 1), (110, 118, 200, 80, 2)]))
    assert samples == [
        StepSample(StepShape(num_decodes=1, graph=True), 5, 90, 10, started_ns=5, waited=False),
        StepSample(StepShape(num_decodes=2, graph=True), 8, 80, None, started_ns=118, waited=False),
    ]


def test_an_idle_time_counts_for_nobody() -> None:
    # After the first step a plan of nothing, then a long wait until something arrives.
    samples = samples_from_steps(steps([(0, 5, 100, 90, 1), (110, 110, 110, 0, 0), (9_000, 9_005, 9_100, 90, 1)]))
    assert [sample.finish_ns for sample in samples] == [10, None]


def test_with_lag_the_plan_after_the_end_counts_not_the_one_in_between() -> None:
    samples = samples_from_steps(steps([(0, 5, 100, 90, 1), (10, 15, 190, 90, 1), (107, 110, 280, 90, 1)]))
    assert [sample.finish_ns for sample in samples] == [7, None, None]


def test_replicas_are_told_apart() -> None:
    columns = steps([(0, 5, 100, 90, 1), (103, 104, 190, 86, 1), (110, 118, 200, 80, 1)])
    columns["replica"] = [0, 1, 0]
    assert [sample.finish_ns for sample in samples_from_steps(columns)] == [10, None, None]


def test_missing_columns_are_named() -> None:
    columns = steps([(0, 5, 100, 90, 1)])
    del columns["device_ns"]
    with pytest.raises(ValueError, match="no column device_ns"):
        samples_from_steps(columns)
