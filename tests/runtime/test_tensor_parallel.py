"""One model over several ranks: tokens equal one rank's, and what dies or hangs is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from runtime.parallel.leader import Leader
from runtime.weights import LoadedModel, load_model
from tests.runtime.engines import Rows, greedy, serve, tokens_of
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
    """Rank 0, this process, with one and with three others."""
    with Leader(request.param, "cpu") as leader:
        yield leader


def generate(loaded: LoadedModel, **how: Any) -> list[tuple[int, ...]]:
    with serve(loaded, **how) as engine:
        return tokens_of(engine.generate(PROMPTS, greedy(TOKENS)))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_each_family_equal_those_of_one_rank(ranks: Leader, folders: dict[str, str], family: str) -> None:
    alone = generate(load_model(folders[family]))
    assert len({token for tokens in alone for token in tokens}) > 10  # a model that says something
    assert generate(load_model(folders[family], ranks=ranks), lag=1) == alone


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
