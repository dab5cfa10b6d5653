"""A specification: what it refuses, in which words, and what it leaves in a record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from experiments import real
from experiments.real import real_limits, run_real
from experiments.replicas import check_served_router
from experiments.spec import CostSpec, LimitsSpec, PoliciesSpec, SpecError, check_spec, read_spec
from experiments.workloads import WorkloadSpec, make_workload
from experiments.workloads.generators import arrivals
from policies import registry
from policies.replica_state import Limits
from policies.stack import StackSpec
from runtime.weights import load_model

WORK = {"name": "chat", "n": 3}


def refused(**fields: Any) -> str:
    """What the specification of a chat workload with these fields is refused for."""
    with pytest.raises(SpecError) as caught:
        check_spec({"workload": WORK, **fields})
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"limits": {"num_blocks": True}}, "limits.num_blocks: Input should be a valid integer, not True"),
        ({"limits": {"num_blocks": 2**24 + 1}}, "limits.num_blocks: Input should be less than or equal to 16777216"),
        ({"limits": {"max_num_seqs": True}}, "limits.max_num_seqs: Input should be a valid integer, not True"),
        ({"limits": {"lag": True}}, "limits.lag: Input should be a valid integer, not True"),
        ({"limits": {"lag": 1.0}}, "limits.lag: Input should be a valid integer, not 1.0"),
        ({"limits": {"lag": 2}}, "limits.lag: Input should be less than or equal to 1, not 2"),
        ({"limits": {"capture_sizes": [2, 1]}}, "limits: capture_sizes must ascend, not [2, 1]"),
        (
            {"limits": {"capture_sizes": [0]}},
            "limits.capture_sizes.0: Input should be greater than or equal to 1",
        ),
        ({"limits": {"capture_sizes": [1, 512]}}, "limits: capture_sizes ends at 512, above max_num_seqs=256"),
        ({"limits": {"memory_share": 1.5}}, "limits.memory_share: Input should be less than or equal to 1, not 1.5"),
        ({"model": {"quantization": "int3"}}, "model.quantization: Input should be 'none' or 'fp8', not 'int3'"),
        ({"model": {"quantization": "fp8"}}, "model: quantization 'fp8' needs dtype bfloat16 or float16, not float32"),
        ({"model": {"kv_cache_dtype": "fp16"}}, "model.kv_cache_dtype: Input should be 'auto' or 'fp8', not 'fp16'"),
        ({"limits": {"kv_cache_gib": True}}, "limits.kv_cache_gib: Input should be a valid number, not True"),
        ({"workload": WORK | {"n": True}}, "workload.n: Input should be a valid integer, not True"),
        ({"workload": WORK | {"rate": True}}, "workload.rate: Input should be a valid number, not True"),
        ({"workload": WORK | {"rate": 1e12}}, "workload.rate: Input should be less than or equal to 1000000"),
        ({"replicas": True}, "replicas: Input should be a valid integer, not True"),
        ({"limits": {"lga": 1}}, "limits.lga: unknown field; did you mean 'lag'? known: num_blocks, kv_cache_gib"),
        ({"limit": {}}, "limit: unknown field; did you mean 'limits'? known: target, workload"),
        ({"policies": {"router": "round_robn"}}, "policies.router: there is no router 'round_robn'; did you mean"),
        ({"policies": {"scheduler": {"name": "mixed", "x": [1]}}}, "policies.scheduler: mixed: x must be one plain"),
        ({"cost": {"kind": "constant", "step_ms": 2, "model": "llama-3.1-8b"}}, "model is only for cost 'roofline'"),
        ({"cost": {"kind": "fitted", "calibration": "c", "device": "l4"}}, "device is only for cost 'roofline'"),
        ({"cost": {"calibration": "c.json"}}, "calibration is only for cost 'fitted', not 'roofline'"),
        ({"cost": {"step_ms": 2}}, "step_ms is only for cost 'constant', not 'roofline'"),
    ],
)
def test_a_field_that_cannot_be_used_is_refused_by_name(fields: dict[str, Any], why: str) -> None:
    message = refused(**fields)
    assert message.startswith("the specification: ")
    assert why in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "cost",
    [
        {"kind": "constant", "step_ms": 2},
        {"kind": "fitted", "calibration": "c.json"},
        {"kind": "roofline", "model": "qwen3-0.6b", "device": "l4"},
        {},
    ],
)
def test_what_is_recorded_of_a_specification_gives_it_again(cost: dict[str, Any]) -> None:
    spec = check_spec({"workload": WORK, "cost": cost})
    assert check_spec(spec.model_dump(mode="json")) == spec


def test_a_kind_of_cost_that_wins_over_the_files_brings_its_own_fields(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("workload: {name: chat, n: 3}\ncost: {model: qwen3-0.6b, dtype: float32}\n")
    assert read_spec(path, {"cost": {"kind": "constant", "step_ms": 2.0}}).cost == CostSpec(kind="constant", step_ms=2)
    same = read_spec(path, {"cost": {"kind": "roofline", "device": "l4"}}).cost
    assert same == CostSpec(model="qwen3-0.6b", dtype="float32", device="l4")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("SmolLM2-135M-Instruct", "smollm2-135m"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("Qwen3-0.6B", "qwen3-0.6b"),
        ("abacus", "abacus"),
    ],
)
def test_a_models_shape_is_known_by_the_models_own_name(name: str, shape: str) -> None:
    assert CostSpec(model=name).model == shape


def test_what_nobody_says_is_as_the_library_has_it() -> None:
    policies, limits = PoliciesSpec(), LimitsSpec()
    assert policies.stack == StackSpec()
    library = Limits(num_blocks=1)
    for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "prefix_caching"):
        assert getattr(limits, name) == getattr(library, name)


def test_what_a_gpu_is_told_is_recorded_and_gives_the_same_specification_again() -> None:
    model = {"device": "cuda", "dtype": "bfloat16", "quantization": "fp8", "kv_cache_dtype": "fp8"}
    limits = {"capture_sizes": [1, 2, 8], "memory_share": 0.8}
    spec = check_spec({"workload": WORK, "model": model, "limits": limits})
    recorded = spec.model_dump(mode="json")
    assert recorded["model"].items() >= model.items()
    assert recorded["limits"].items() >= limits.items()
    assert check_spec(recorded) == spec


def test_a_cpu_captures_nothing_and_refuses_to_be_told_to() -> None:
    given: tuple[int, ...] | None
    loaded = load_model("tiny", load_format="dummy")
    for given in (None, ()):
        spec = check_spec({"workload": WORK, "limits": {"num_blocks": 64, "capture_sizes": given}})
        assert real_limits(spec, loaded).capture_sizes == ()
    spec = check_spec({"workload": WORK, "limits": {"num_blocks": 64, "capture_sizes": [1, 2]}})
    with pytest.raises(SpecError, match="attention 'sdpa' on cpu runs from no captured graphs; leave it out"):
        real_limits(spec, loaded)


def test_an_fp8_cache_of_a_given_memory_holds_four_times_as_much_as_a_float32_one() -> None:
    loaded = load_model("tiny", load_format="dummy")

    def num_blocks(kv_cache_dtype: str) -> int:
        model = {"kv_cache_dtype": kv_cache_dtype}
        spec = check_spec({"workload": WORK, "limits": {"kv_cache_gib": 0.25}, "model": model})
        return real_limits(spec, loaded).num_blocks + 1  # one more is the scratch block

    assert num_blocks("fp8") == 4 * num_blocks("auto")


@pytest.mark.parametrize("given", [{}, {"memory_share": 0.5}])
def test_a_cards_kv_cache_is_what_the_largest_step_leaves(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def profile_num_blocks(loaded: Any, **sizes: Any) -> int:
        asked.update(sizes)
        return 123

    device = torch.device("cuda")
    loaded = MagicMock(name="a model on a card")
    loaded.model.device, loaded.model.dtype, loaded.ranks.size = device, torch.bfloat16, 1
    loaded.config = load_model("tiny", load_format="dummy").config
    monkeypatch.setattr(real, "profile_num_blocks", profile_num_blocks)
    monkeypatch.setattr(real, "free_bytes", lambda device: 2**33)
    monkeypatch.setattr(real, "get_backend", lambda name, device: MagicMock(capturable=True))
    limits = {"max_num_batched_tokens": 512, "max_num_seqs": 12, **given}
    spec = check_spec({"workload": WORK, "limits": limits, "model": {"kv_cache_dtype": "fp8"}})
    chosen = real.real_limits(spec, loaded)
    assert (chosen.num_blocks, chosen.capture_sizes) == (123, (1, 2, 4, 8, 12))
    assert asked == {
        "block_size": 16,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 12,
        "max_model_len": chosen.max_model_len,
        "attention": "auto",
        "kv_dtype": torch.float8_e4m3fn,
        "memory_share": given.get("memory_share", 0.95),
    }
    small = check_spec({"workload": WORK, "limits": {"num_blocks": 7, "capture_sizes": [3]}})
    assert real.real_limits(small, loaded).capture_sizes == (3,)


def test_the_runtime_serves_one_replica(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="serves one replica, not 2; simulate several"):
        run_real(check_spec({"workload": WORK, "replicas": 2}), tmp_path / "run")


@pytest.mark.parametrize("limits", [{"num_blocks": 2**24}, {"kv_cache_gib": 1e5}])
def test_a_kv_cache_larger_than_the_machine_is_refused_with_both_figures(limits: dict[str, Any]) -> None:
    spec = check_spec({"workload": WORK, "limits": {"block_size": 1024, **limits}})
    with pytest.raises(SpecError, match=r"blocks needs [\d,.]+ GiB, and cpu has [\d,.]+ GiB; lower limits.num_blocks"):
        real_limits(spec, load_model("tiny", load_format="dummy"))


@pytest.mark.parametrize("name", ["chat", "code", "prefix-chat", "reasoning", "multi-tenant", "fixed"])
def test_a_few_requests_are_made_of_few_arrivals_at_any_rate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    horizons: list[float] = []
    original = arrivals.until

    def until(make: Callable[[float], arrivals.Seconds], *rest: Any) -> tuple[arrivals.Seconds, float]:
        def noted(horizon: float) -> arrivals.Seconds:
            horizons.append(horizon)
            return make(horizon)

        return original(noted, *rest)

    monkeypatch.setattr(arrivals, "until", until)
    for rate in (1e6, 1e-4):
        horizons.clear()
        assert len(make_workload(WorkloadSpec(name=name, n=5, rate=rate))) == 5
        assert bool(horizons) == (name not in ("multi-tenant", "fixed"))  # those draw n arrivals, over no horizon
        assert all(horizon * rate < 100 for horizon in horizons)


@pytest.mark.parametrize("name", ["chat", "prefix-chat", "reasoning"])
def test_few_requests_are_the_first_of_many(name: str) -> None:
    few, many = (make_workload(WorkloadSpec(name=name, n=n, rate=2.0)) for n in (3, 300))
    assert np.array_equal(few.arrival_ns, many.arrival_ns[:3])


def test_arrivals_beyond_what_can_be_drawn_or_kept_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of an mmpp at most 10,000,000 s are drawn"):
        make_workload(WorkloadSpec(name="chat", n=5, duration_s=1e9, rate=1e-6))
    with pytest.raises(ValueError, match="the last request would arrive after"):
        make_workload(WorkloadSpec(name="fixed", n=50_000, rate=1e-6))


@pytest.mark.parametrize("router", registry.names("router"))
def test_a_router_that_moves_kv_is_refused_by_a_server_and_no_other_is(router: str) -> None:
    if router in ("disaggregated", "llumnix") or registry.moves_kv(registry.find("router", router)):
        with pytest.raises(SpecError, match=f"router {router} moves KV cache between replicas, which is for simul"):
            check_served_router(router)
    else:
        check_served_router(router)
