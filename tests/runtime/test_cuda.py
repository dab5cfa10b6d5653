"""The runtime on a CUDA card: the same tokens and the same decisions as on the CPU."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from experiments.divergence import diff_decisions
from experiments.records import RunWriter, read_run, run_info
from experiments.replaying import replay_run
from policies.replica_state import Limits
from policies.stack import StackSpec
from runtime.engine import Engine
from runtime.sampling.params import SamplingParams
from runtime.weights import LoadedModel, load_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]

PROMPTS = [[(7 * i + 3 * j) % 900 + 1 for j in range(5 + 11 * i)] for i in range(12)]
AMPLE, TIGHT = (
    Limits(256, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256),
    Limits(24, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256),
)


@pytest.fixture(scope="module")
def on_cpu() -> LoadedModel:
    return load_model("smollm2-135m", load_format="dummy")


@pytest.fixture(scope="module")
def on_card(on_cpu: LoadedModel) -> LoadedModel:
    """The same random weights, copied: each device draws its own."""
    loaded = load_model("smollm2-135m", load_format="dummy", device="cuda")
    loaded.model.load_state_dict(on_cpu.model.state_dict())
    return loaded


def tokens(loaded: LoadedModel, limits: Limits, params: SamplingParams, stack: str = "mixed") -> list[tuple[int, ...]]:
    with Engine(loaded, limits, StackSpec(stack).build(), check=True) as engine:
        return [completion.token_ids for (completion,) in engine.generate(PROMPTS, params)]


@pytest.fixture(scope="module")
def greedy(on_cpu: LoadedModel) -> list[tuple[int, ...]]:
    return tokens(on_cpu, AMPLE, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("stack", ["mixed", "sarathi,chunk_size=48", "prefill_first", "static,max_batch_size=4"])
def test_greedy_tokens_are_the_cpus(stack: str, lag: int, on_card: LoadedModel, greedy: list[tuple[int, ...]]) -> None:
    for limits in (AMPLE, TIGHT):
        lagged = Limits(**{**asdict(limits), "lag": lag})
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        assert tokens(on_card, lagged, params, stack) == greedy


def test_sampled_tokens_are_the_cpus(on_cpu: LoadedModel, on_card: LoadedModel) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1, seed=5, max_tokens=16, ignore_eos=True)
    assert tokens(on_card, AMPLE, params) == tokens(on_cpu, AMPLE, params)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_on_the_card_replays_without_a_divergence(lag: int, on_card: LoadedModel, tmp_path: Path) -> None:
    limits = Limits(**{**asdict(TIGHT), "lag": lag})
    stack = StackSpec()
    info = run_info("real", spec={}, limits=asdict(limits), stack=stack.as_dict(), clairvoyant=False, workload={})
    params = SamplingParams(max_tokens=24, seed=1)
    with (
        RunWriter(tmp_path / "real", info) as writer,
        Engine(on_card, limits, stack.build(), recorder=writer) as engine,
    ):
        engine.generate(PROMPTS, params)
    recorded = read_run(tmp_path / "real")
    replay_run(recorded, tmp_path / "replay")
    assert recorded.requests["preemptions"].sum() > 0
    assert diff_decisions(recorded, read_run(tmp_path / "replay")) is None


def test_half_precision_serves(on_cpu: LoadedModel) -> None:
    loaded = load_model("smollm2-135m", load_format="dummy", device="cuda", dtype=torch.bfloat16)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    assert [len(ids) for ids in tokens(loaded, AMPLE, params)] == [24] * len(PROMPTS)
