"""Every public trace loads and reproduces its published statistics, to the digits printed there."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from experiments.workloads import Workload, WorkloadSpec, load, make_workload
from experiments.workloads.loaders import read_rows
from experiments.workloads.stats import arrival_stats, ideal_hit_rate, length_stats

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

# file, rows, input and output (mean / p50 / p90 / p99 / max), then span s, req/s, CV, IDC 1/10/60 s; as printed
ROWS = [
    (AZURE_CONV, 19366, "1155 1020 2734 4142 14050", "211 129 424 601 1000", "3502 5.53 1.09 1.39 3.86 16.13"),
    (AZURE_CODE, 8819, "2048 1469 5188 7436 7437", "28 13 55 251 1899", "3436 2.566 13.15 13.19 71.64 163.97"),
    (MOONCAKE, 12031, "12035 6909 27367 85400 126195", "343 350 597 1119 2000", "3537 3.401 3.03 7.90 2.10 2.90"),
    ("ragpulse/0_trace.jsonl.gz", 7106, "2944 3140 3958 5438 7712", "283 234 563 891 2183",
     "604603 0.0118 3.06 1.01 1.07 1.73"),
    (CLAUDE, 5847, "104154 93341 155506 432489 868539", "401 209 806 3370 9873", None),
    (MINISWE, 402, "6170 3890 12330 39429 46594", "110 95 177 291 348", "552 0.7263 0.67 0.42 0.71 0.56"),
    (MAGAGENT, 746, "1992 1044 9083 10265 10807", "586 332 480 10000 10000", "6449 0.1155 1.69 0.93 1.01 3.46"),
    ("multitenant/vtc_arena_real_trace.csv", 1500, "136 40 432 902 1021", "256 211 513 785 977",
     "600 2.498 1.10 1.39 2.51 2.56"),
    ("servegen/deepseek-r1_generated_1h.csv.gz", 48277, "1051 115 1326 19384 54924",
     "3023 2084 6883 15046 32216", "3600 13.41 1.67 7.33 16.75 32.25"),
    (SHAREGPT_8K, 30731, "2340 1730 5696 7434 8141", "439 415 834 998 1024", None),
    (ARXIV, 28257, "2588 2730 3702 3933 4054", "291 167 372 3271 4056", None),
    ("lengths/sharegpt_v3_turns_cl100k.csv.gz", 61243, "797 726 1618 1941 161281", "280 255 550 769 22267", None),
    ("lengths/lmsys_apex_1024.csv.gz", 1024, "62 17 177 586 1037", "162 117 389 533 761",
     "4197 0.2437 0.97 0.99 0.94 0.91"),
]  # fmt: skip


def agrees(value: float, printed: str) -> bool:
    """Is `printed` the value at the digits that it shows? Some were rounded to one digit more on the way."""
    digits = len(printed.partition(".")[2])
    return abs(round(value, digits + 1) - float(printed)) <= 0.5 * 10.0**-digits * (1 + 1e-6)


@pytest.mark.parametrize(("name", "requests", "inputs", "outputs", "arrivals"), ROWS, ids=[r[0] for r in ROWS])
def test_a_public_trace_reproduces_its_published_statistics(
    trace: Find, name: str, requests: int, inputs: str, outputs: str, arrivals: str | None
) -> None:
    rows = rows_of(trace(name))
    assert len(rows.line) == requests
    for column, printed in ((rows.prompt_tokens, inputs), (rows.output_tokens, outputs)):
        for (statistic, value), text in zip(length_stats(np.array(column)).items(), printed.split(), strict=True):
            assert agrees(value, text), f"{statistic}: {value}, published {text}"
    if arrivals is not None:
        found = arrival_stats(np.sort(np.array(rows.arrival_ns)))
        for (statistic, value), text in zip(found.items(), arrivals.split(), strict=True):
            assert agrees(value, text), f"{statistic}: {value}, published {text}"


@pytest.mark.parametrize("name", [row[0] for row in ROWS], ids=[row[0] for row in ROWS])
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


@pytest.mark.parametrize(
    ("name", "block", "published"),
    [(MOONCAKE, 512, "0.374"), (MINISWE, 16, "0.934"), (MAGAGENT, 16, "0.842"), (CLAUDE, 64, "0.957")],
)
def test_a_trace_with_blocks_reproduces_its_published_hit_rate(
    trace: Find, name: str, block: int, published: str
) -> None:
    rows = rows_of(trace(name))
    assert rows.hash_ids is not None
    assert rows.hash_block == block
    rate = ideal_hit_rate(rows.prompt_tokens, rows.hash_ids, block)
    assert agrees(rate, published)
    described = workload_of(trace(name)).describe()["ideal_hit_rate"]
    assert described == pytest.approx(rate, abs=1e-5)  # rows without a prompt or an output share next to nothing


@pytest.mark.parametrize(("name", "published"), [(MINISWE, "0.933"), (MAGAGENT, "0.835")])
def test_a_trace_of_agents_reproduces_its_published_hit_rate_within_sessions(
    trace: Find, name: str, published: str
) -> None:
    workload = workload_of(trace(name))
    assert workload.session is not None
    assert workload.hash_ids is not None
    members: dict[int, list[int]] = defaultdict(list)
    for row, session in enumerate(workload.session.tolist()):
        members[session].append(row)
    matched = 0.0
    for rows in members.values():
        part = workload.take(np.array(rows))
        assert part.hash_ids is not None
        matched += ideal_hit_rate(part.prompt_tokens, part.hash_ids, 16) * part.prompt_tokens.sum()
    assert agrees(matched / workload.prompt_tokens.sum(), published)


def test_the_conversation_trace_has_the_published_number_of_blocks(trace: Find) -> None:
    workload = workload_of(trace(MOONCAKE))
    assert workload.hash_ids is not None
    assert sum(map(len, workload.hash_ids)) == 288_500
    assert len({block for ids in workload.hash_ids for block in ids}) == 182_790


def test_equal_timestamps_keep_the_order_of_the_file(trace: Find) -> None:
    rows, workload = rows_of(trace(MOONCAKE)), workload_of(trace(MOONCAKE))
    assert len(set(workload.arrival_ns.tolist())) == 1180
    assert workload.prompt_tokens.tolist() == list(rows.prompt_tokens)


def test_the_clients_of_the_arena_log_have_their_published_shares(trace: Find) -> None:
    workload = workload_of(trace("multitenant/vtc_arena_real_trace.csv"))
    assert workload.tenant is not None
    _, counts = np.unique(workload.tenant, return_counts=True)
    shares = np.sort(counts)[::-1] / len(workload)
    assert len(shares) == 27
    assert agrees(shares[0], "0.197")
    assert agrees(shares[:4].sum(), "0.585")


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


@pytest.mark.parametrize(("capacity", "published"), LRU_CURVE)
def test_the_conversation_trace_reproduces_its_published_lru_curve(trace: Find, capacity: int, published: str) -> None:
    assert lru_hit_rate(workload_of(trace(MOONCAKE)), capacity) == pytest.approx(float(published), abs=1.1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_prefix_chat_has_the_hit_rate_curve_of_the_trace_it_stands_for(seed: int) -> None:
    made = make_workload(WorkloadSpec(name="prefix-chat", duration_s=3537, seed=seed))
    for capacity, published in [*LRU_CURVE, (10**9, "0.374")]:
        assert lru_hit_rate(made, capacity) == pytest.approx(float(published), abs=0.02)
    assert len(made) == pytest.approx(12_031, rel=0.05)
    assert made.prompt_tokens.mean() == pytest.approx(12_035, rel=0.1)
