"""The roofline against what one H100 was measured to do, and against its own rules."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.model_shape import ModelShape
from policies.shapes import StepShape
from simulator.costs import RooflineCost
from simulator.costs.roofline import HostTimes, Sums
from simulator.devices import DEVICES

LLAMA = RooflineCost(ModelShape.preset("llama-3.1-8b"), DEVICES["h100-sxm"])
EXPERTS = RooflineCost(ModelShape.preset("qwen3-30b-a3b"), DEVICES["h100-sxm"])


def decodes(batch: int, context: int) -> StepShape:
    return StepShape(
        num_decodes=batch,
        decode_context=batch * context,
        max_context=context,
        num_samples=batch,
        padded_tokens=batch,
        graph=True,
    )


def prompt(tokens: int, samples: int = 1) -> StepShape:
    return StepShape(
        num_chunks=1,
        chunk_tokens=tokens,
        chunk_pairs=tokens * (tokens + 1) // 2,
        chunk_context=tokens,
        max_context=tokens,
        num_samples=samples,
        padded_tokens=tokens,
    )


# vLLM 0.24 on an H100 with the 8B shape: context 512 to 640, milliseconds a step.
@pytest.mark.parametrize(
    ("batch", "measured"), [(1, 6.46), (8, 6.75), (32, 7.52), (64, 8.43), (128, 10.98), (256, 15.88)]
)
def test_a_decode_step_is_above_the_floor_of_bytes_and_not_above_a_measured_one(batch: int, measured: float) -> None:
    model = ModelShape.preset("llama-3.1-8b")
    floor = (model.weight_bytes_per_step + batch * 576 * model.kv_bytes_per_token) / 3.11e12 * 1e3
    predicted = LLAMA.step_ns(decodes(batch, 576)) / 1e6
    assert floor < predicted
    assert 0.7 * measured < predicted < measured


@pytest.mark.parametrize(("tokens", "linear"), [(512, 11.2), (2048, 36.2)])
def test_a_prompt_takes_about_as_long_as_its_linear_layers_were_measured(tokens: int, linear: float) -> None:
    assert 0.85 * linear < LLAMA.cost(prompt(tokens)).device_ns / 1e6 < 1.25 * linear


SIZES = ("num_decodes", "decode_context", "max_context", "num_chunks", "chunk_tokens", "chunk_pairs", "chunk_context")


@given(
    sizes=st.fixed_dictionaries({name: st.integers(0, 100_000) for name in (*SIZES, "num_samples", "padded_tokens")}),
    name=st.sampled_from([*SIZES, "num_samples", "padded_tokens"]),
    more=st.integers(1, 100_000),
)
def test_no_size_makes_a_step_cheaper(sizes: dict[str, int], name: str, more: int) -> None:
    small = StepShape(**sizes)  # type: ignore[arg-type]  # graph is none of them
    large = small._replace(**{name: sizes[name] + more})  # type: ignore[arg-type]
    for costs in (LLAMA, EXPERTS):
        assert 0 < costs.step_ns(small) <= costs.step_ns(large)
        assert costs.cost(small).device_ns <= costs.cost(large).device_ns


def test_small_batches_wait_for_the_weights_and_large_ones_for_arithmetic() -> None:
    without_context = [LLAMA.cost(decodes(batch, 0)).device_ns for batch in (1, 64, 4096, 8192)]
    assert without_context[0] == without_context[1]
    assert without_context[3] > 1.9 * without_context[2]


def test_a_step_reads_the_experts_that_its_tokens_hit() -> None:
    ns = [EXPERTS.cost(decodes(batch, 0)).device_ns for batch in (1, 2, 16, 256, 512)]
    byte = (ns[1] - ns[0]) / (EXPERTS.model.linear_bytes_read(2) - EXPERTS.model.linear_bytes_read(1))
    assert 1 / byte == pytest.approx(DEVICES["h100-sxm"].reached_bandwidth / 1e9, rel=1e-3)
    assert ns[0] < ns[1] < ns[2] < ns[3]
    assert ns[4] == pytest.approx(ns[3], rel=0.01)  # all of them are hit


def test_many_tokens_work_with_their_own_experts_and_not_with_all() -> None:
    prefill = EXPERTS.cost(prompt(8192, samples=0)).device_ns
    all_experts = EXPERTS.model.linear_weights * 2 * 8192 / DEVICES["h100-sxm"].reached_flops("bf16") * 1e9
    assert prefill < 0.5 * all_experts


def test_a_chunk_that_samples_nothing_is_spared_the_lm_head() -> None:
    spared = LLAMA.cost(prompt(512)).device_ns - LLAMA.cost(prompt(512, samples=0)).device_ns
    assert spared == pytest.approx(128256 * 4096 * 2 / 3.11e12 * 1e9, rel=0.01)


def test_a_device_with_faster_memory_decodes_faster_and_prefills_as_fast() -> None:
    h200 = RooflineCost(LLAMA.model, DEVICES["h200"])
    assert h200.step_ns(decodes(1, 576)) < 0.8 * LLAMA.step_ns(decodes(1, 576))
    assert h200.step_ns(prompt(4096, 0)) == LLAMA.step_ns(prompt(4096, 0))


def test_float32_weights_are_computed_in_fp32() -> None:
    single = RooflineCost(LLAMA.model.in_dtype("float32"), LLAMA.device)
    assert single.dtype == "fp32"
    assert single.cost(prompt(2048)).device_ns > 10 * LLAMA.cost(prompt(2048)).device_ns


def test_host_times_are_what_they_are_set_to() -> None:
    model = RooflineCost(LLAMA.model, LLAMA.device, HostTimes(prepare_ns=7, finish_ns=5, finish_ns_per_sample=3))
    cost = model.cost(decodes(10, 100))
    assert (cost.prepare_ns, cost.finish_ns) == (7, 35)
    assert model.step_ns(decodes(10, 100)) == cost.total_ns == 42 + cost.device_ns
    with pytest.raises(ValueError, match="must not be negative"):
        HostTimes(prepare_ns=-1)


def test_nothing_was_measured_so_no_shape_is_inside() -> None:
    assert not LLAMA.inside(decodes(1, 1))


def test_the_description_is_json_and_names_model_and_device() -> None:
    description = json.loads(json.dumps(LLAMA.describe()))
    assert description["kind"] == "roofline"
    assert description["model"]["name"] == "llama-3.1-8b"
    assert description["device"]["source"].startswith("NVIDIA H100")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="no dtype 'fp64'"):
        RooflineCost(LLAMA.model, LLAMA.device, dtype="fp64")


def test_devices_that_share_a_model_halve_its_work_and_pay_for_their_sums() -> None:
    """Llama-3.1-8B has 65 sums; over NVLink one of 8 KB takes 4 us, and one of 16 MB 69 us more."""
    two = RooflineCost(LLAMA.model, LLAMA.device, tensor_parallel=2)
    launches = LLAMA.device.launch_ns_per_layer * 32
    for shape, message in ((decodes(1, 576), 4096 * 2), (prompt(2048), 2048 * 4096 * 2)):
        sums = 65 * (4_000 + message / (450e9 * 0.54) * 1e9)
        expected = (LLAMA.cost(shape).device_ns - launches) / 2 + launches + sums
        assert two.cost(shape).device_ns == pytest.approx(expected, abs=2)
    swap = StepShape(padded_tokens=0, swapped_out=1000)
    moved = [cost.cost(swap).device_ns - cost.cost(StepShape()).device_ns - 20_000 for cost in (LLAMA, two)]
    assert moved[0] == pytest.approx(2 * moved[1], abs=2)
    assert two.describe()["tensor_parallel"] == 2
    assert "tensor_parallel" not in LLAMA.describe()


def test_sums_of_more_devices_send_more_and_those_over_a_slow_link_take_longer() -> None:
    eight = Sums().ns(1e6, 8, 450e9) - 4_000
    assert eight == pytest.approx(2 * 7 / 8 * 1e6 / (450e9 * 0.54) * 1e9)
    assert Sums().ns(1e6, 2, 64e9) - 4_000 == pytest.approx(1e6 / (64e9 * 0.54) * 1e9)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        RooflineCost(LLAMA.model, LLAMA.device, tensor_parallel=0)
