"""One model over several ranks: tokens equal one rank's, and what dies or hangs is noticed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from policies.replica_state import Limits
from policies.stack import StackSpec
from runtime.engine import Engine, EngineDead
from runtime.parallel.leader import Leader
from runtime.sampling.params import SamplingParams
from runtime.weights import LoadedModel, load_model
from tests.runtime.engines import Listener, Rows, greedy, serve, submit_together, tokens_of, transformers_model
from tests.runtime.tiny_models import TINY

EXPERTS = {"moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
FAMILIES = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen2": {"num_attention_heads": 8},
    "Qwen3": {"head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 3},
    "Qwen3Moe": {"head_dim": 16, "attention_bias": False, **EXPERTS},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}
PROMPTS = [[(7 * i + 3 * j) % 290 + 1 for j in range(12 + 9 * i)] for i in range(5)]
TOKENS = 10


def random_model(family: str, folder: Path) -> str:
    """A folder with a small model of transformers' making, sharp enough for tokens to differ."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **FAMILIES[family]})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: random_model(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Leader]:
    """Rank 0, this process, with one and with three others. The last tests of each end them."""
    with Leader(request.param, "cpu", silence_s=4.0) as leader:
        yield leader


def generate(loaded: LoadedModel, **how: Any) -> list[tuple[int, ...]]:
    with serve(loaded, **how) as engine:
        return tokens_of(engine.generate(PROMPTS, greedy(TOKENS)))


def test_tokens_of_each_family_equal_those_of_one_rank(ranks: Leader, folders: dict[str, str]) -> None:
    for family in FAMILIES if ranks.size == 2 else ("Llama", "Qwen3", "Mixtral"):  # of two or three KV heads
        alone = generate(load_model(folders[family]))
        assert len({token for tokens in alone for token in tokens}) > 10  # a model that says something
        assert generate(load_model(folders[family], ranks=ranks), lag=1) == alone, family


@pytest.fixture(scope="module")
def smollm2_folder(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The default model as safetensors: each rank would take long to read the vocabulary in a GGUF file."""
    folder = tmp_path_factory.mktemp("smollm2")
    transformers_model(smollm2).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def test_tokens_of_the_default_model_equal_those_of_one_rank(ranks: Leader, smollm2_folder: str) -> None:
    """Of its nine heads and three KV heads two ranks have 6 and 3, and four have 2, 1, 3 and 3."""
    prompts = [[1, 504, 3575, 282, 4649, 314], list(range(300, 340))]
    found = []
    for loaded in (load_model(smollm2_folder), load_model(smollm2_folder, ranks=ranks)):
        with serve(loaded, num_blocks=16) as engine:
            found.append(tokens_of(engine.generate(prompts, greedy(8))))
    assert found[0] == found[1]


def test_tokens_survive_preemption_and_prefix_hits(ranks: Leader, folders: dict[str, str]) -> None:
    alone = generate(load_model(folders["Llama"]))
    rows = Rows()
    shared = load_model(folders["Llama"], ranks=ranks)
    with serve(shared, recorder=rows, lag=1, num_blocks=16, block_size=8, max_num_batched_tokens=32) as engine:
        assert tokens_of(engine.generate(PROMPTS, greedy(TOKENS))) == alone
        again = [tokens_of(found := engine.generate([PROMPTS[4]], greedy(TOKENS))) for _ in range(2)]
    assert again == [[alone[4]]] * 2
    assert rows.num_preemptions > 0
    assert found[0][0].num_cached_tokens >= 40


SAMPLED: dict[int, dict[str, Any]] = {
    4: {"temperature": 0.9, "seed": 3},  # each rank draws from its own part of the vocabulary
    2: {
        "temperature": 0.8, "seed": 4, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.2,
        "min_tokens": 3, "logprobs": 2,
    },
}  # fmt: skip


def test_sampled_tokens_equal_those_of_one_rank(ranks: Leader, folders: dict[str, str]) -> None:
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, **SAMPLED[ranks.size])
    found = []
    for loaded in (load_model(folders["Qwen2"]), load_model(folders["Qwen2"], ranks=ranks)):
        with serve(loaded, lag=1) as engine:
            found.append([completion for (completion,) in engine.generate(PROMPTS, params)])
    alone, shared = found
    assert [c.token_ids for c in shared] == [c.token_ids for c in alone]
    logprobs = [[one.sampled for one in c.logprobs] for c in alone]
    assert [[one.sampled for one in c.logprobs] for c in shared] == [pytest.approx(some, abs=1e-3) for some in logprobs]


def test_tokens_survive_swaps_to_the_memory_of_the_host(ranks: Leader, folders: dict[str, str]) -> None:
    rows = Rows()
    shared = load_model(folders["Llama"], ranks=ranks)
    stack = StackSpec(preemption="last_admitted,mode=swap", admission="full_prompt").build(block_size=8)
    limits = Limits(16, 8, max_model_len=256, lag=1, num_host_blocks=40)
    with Engine(shared, limits, stack, recorder=rows, check=True) as engine:
        assert tokens_of(engine.generate(PROMPTS, greedy(TOKENS))) == generate(load_model(folders["Llama"]))
    assert sum(step["swapped_in"] for step in rows.steps) > 0


def test_a_rank_that_dies_or_hangs_ends_every_request_with_an_error(ranks: Leader, folders: dict[str, str]) -> None:
    """Of two ranks one is killed, of four one is stopped."""
    last = ranks.followers[-1]
    engine = serve(load_model(folders["Llama"], ranks=ranks), max_model_len=256)
    with engine:
        running = submit_together(engine, [[1, 2, 3]] * 3, greedy(200))
        for listener in running:
            listener.wait_for_tokens(2)
        before = time.monotonic()
        last.process.send_signal(signal.SIGKILL if ranks.size == 2 else signal.SIGSTOP)
        errors = [listener.last().error for listener in running]
        assert time.monotonic() - before < 20  # seconds, on a machine that may be busy
        engine.wait()
        reason = "was killed by signal 9" if ranks.size == 2 else "has given no sign of life for 4 s and was killed"
        assert errors == [f"the engine has stopped: RankFailed: tensor-parallel rank {ranks.size - 1} {reason}"] * 3
        with pytest.raises(EngineDead, match=reason):
            engine.submit([1], greedy(1), Listener())
    ranks.close()
    for follower in ranks.followers:  # not even as zombies
        with pytest.raises(ProcessLookupError):
            os.kill(follower.process.pid, 0)


def test_an_error_on_the_first_rank_ends_every_request_and_the_other_rank(folders: dict[str, str]) -> None:
    with Leader(2, "cpu", silence_s=4.0) as ranks:
        engine = serve(load_model(folders["Llama"], ranks=ranks), max_model_len=256)

        def broken(*_: object) -> None:
            raise RuntimeError("no memory")

        engine._runner._sampler = broken  # type: ignore[assignment]
        with engine:
            listener = Listener()
            engine.submit([1, 2, 3], SamplingParams(temperature=1.0, top_k=5, max_tokens=4), listener)
            assert "no memory" in str(listener.last().error)


STUCK = """
import threading
from runtime.executor import Executor
original, steps = Executor.execute, []

def execute(self, work, sample=None):
    steps.append(work)
    if len(steps) > 3:
        threading.Event().wait()
    return original(self, work, sample)

Executor.execute = execute
"""


def test_a_rank_that_is_stuck_in_a_step_ends_every_request_with_an_error(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on giving signs of life; the other rank waits for it in a sum."""
    (tmp_path / "sitecustomize.py").write_text(STUCK)
    monkeypatch.syspath_prepend(str(tmp_path))  # which the other rank's process has, too
    with Leader(2, "cpu", silence_s=3.0) as ranks:
        engine = serve(load_model(folders["Llama"], ranks=ranks), max_model_len=256)
        with engine:
            running = submit_together(engine, [[1, 2, 3]] * 3, greedy(200))
            before = time.monotonic()
            errors = {listener.last().error for listener in running}
            assert time.monotonic() - before < 20  # seconds, on a machine that may be busy
            reason = "ranks are stuck: a step has not ended, and nobody has computed for 3 s"
            assert errors == {f"the engine has stopped: RankFailed: tensor-parallel {reason}"}
            with pytest.raises(EngineDead, match=reason):
                engine.submit([1], greedy(1), Listener())
        process = ranks.followers[0].process
    with pytest.raises(ProcessLookupError):  # not even a zombie
        os.kill(process.pid, 0)
