"""Every public trace loads, keeps what can be served, and is what the generators stand for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from experiments.workloads import Workload, WorkloadSpec, load, make_workload
from experiments.workloads.loaders import read_rows

Find = Callable[[str], Path]

rows_of = cache(read_rows)  # each file is read once
workload_of = cache(load)

AZURE_CONV = "azure2023/AzureLLMInferenceTrace_conv.csv"
AZURE_CODE = "azure2023/AzureLLMInferenceTrace_code.csv"
MOONCAKE = "mooncake/conversation_trace.jsonl.gz"
MINISWE = "agents/miniswe_blk16.jsonl.gz"
MAGAGENT = "agents/magagent_blk16.jsonl.gz"
CLAUDE = "agents/claude_code_sessions_sample100.jsonl.gz"
ARXIV = "lengths/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv.gz"
SHAREGPT_8K = "lengths/sharegpt_8k_filtered_stats_llama2_tokenizer.csv.gz"

FILES = (
    *(AZURE_CONV, AZURE_CODE, MOONCAKE, "ragpulse/0_trace.jsonl.gz", CLAUDE, MINISWE, MAGAGENT),
    *("multitenant/vtc_arena_real_trace.csv", "servegen/deepseek-r1_generated_1h.csv.gz", SHAREGPT_8K, ARXIV),
    *("lengths/sharegpt_v3_turns_cl100k.csv.gz", "lengths/lmsys_apex_1024.csv.gz"),
)


def agrees(value: float, printed: str) -> bool:
    """Is `printed` the value at the digits that it shows? Some were rounded to one digit more on the way."""
    digits = len(printed.partition(".")[2])
    return abs(round(value, digits + 1) - float(printed)) <= 0.5 * 10.0**-digits * (1 + 1e-6)


@pytest.mark.parametrize("name", FILES)
def test_a_public_trace_becomes_a_workload_that_keeps_every_servable_row(trace: Find, name: str) -> None:
    rows, workload = rows_of(trace(name)), workload_of(trace(name))
    prompts, outputs = np.array(rows.prompt_tokens), np.array(rows.output_tokens)
    servable = (prompts > 0) & (outputs > 0)
    assert len(workload) == servable.sum()
    assert workload.prompt_tokens.sum() == prompts[servable].sum()
    assert workload.output_tokens.sum() == outputs[servable].sum()
    assert workload.arrival_ns[0] == 0
    assert set(workload.max_tokens.tolist()) == {outputs.max()}
    dropped = [step for step in workload.provenance["steps"] if step["step"] == "drop_zero_lengths"]
    assert sum(step["no_prompt"] + step["no_output"] for step in dropped) == len(prompts) - servable.sum()


def test_equal_timestamps_keep_the_order_of_the_file(trace: Find) -> None:
    rows, workload = rows_of(trace(MOONCAKE)), workload_of(trace(MOONCAKE))
    assert len(set(workload.arrival_ns.tolist())) == 1180
    assert workload.prompt_tokens.tolist() == list(rows.prompt_tokens)


def lru_hit_rate(workload: Workload, capacity: int) -> float:
    """Token-weighted; after each request its blocks are touched tail first, then the oldest are evicted."""
    assert workload.hash_ids is not None
    cache: OrderedDict[int, None] = OrderedDict()
    matched = 0
    for tokens, ids in zip(workload.prompt_tokens.tolist(), workload.hash_ids, strict=True):
        hits = next((i for i, block in enumerate(ids) if block not in cache), len(ids))
        matched += min(hits * workload.hash_block, tokens)
        for block in reversed(ids):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return matched / int(workload.prompt_tokens.sum())


LRU_CURVE = [(1_000, "0.045"), (5_000, "0.114"), (10_000, "0.216"), (20_000, "0.294"), (30_000, "0.332"), (50_000, "0.362")]  # fmt: skip # noqa: E501


@pytest.mark.parametrize("seed", [0, 1])
def test_prefix_chat_has_the_hit_rate_curve_of_the_trace_it_stands_for(seed: int) -> None:
    made = make_workload(WorkloadSpec(name="prefix-chat", duration_s=3537, seed=seed))
    for capacity, published in [*LRU_CURVE, (10**9, "0.374")]:
        assert lru_hit_rate(made, capacity) == pytest.approx(float(published), abs=0.02)
    assert len(made) == pytest.approx(12_031, rel=0.05)
    assert made.prompt_tokens.mean() == pytest.approx(12_035, rel=0.1)
