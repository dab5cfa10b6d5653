"""The Triton attention over paged caches, by launch sizes: `python -m benchmarks.gpu.attention [--only CASE,...]`.

Shapes are those of Llama-3.1-8B and Qwen3-0.6B, pages of 16 tokens in random order, bfloat16. Each figure is the time
of a call in a CUDA graph of many, over caches that together exceed the L2 cache, beside the floor of the bytes (decode)
or operations (prefill) and FlashInfer's and FlashAttention-4's figures on the same kind of card where they are known.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
from collections.abc import Callable
from dataclasses import asdict

import torch

from benchmarks.gpu.results import header, out_folder, save
from runtime.attention.triton import DecodeConfig, PrefillConfig, TritonBackend
from runtime.forward import ForwardInputs
from runtime.kv_cache import PagedKVCache
from runtime.model_config import ModelConfig

READ_BYTES_PER_S = 3.11e12
FLOPS = 789e12

random.seed(0)
CASES: dict[str, tuple[list[int], list[int]]] = {  # query lengths, sequence lengths
    "decode 1 x 600": ([1], [600]),
    "decode 1 x 4096": ([1], [4096]),
    "decode 8 x 600": ([1] * 8, [600] * 8),
    "decode 64 x 1024": ([1] * 64, [1024] * 64),
    "decode 256 x 600": ([1] * 256, [600] * 256),
    "decode 32 of 16 to 8000": ([1] * 32, [random.randint(16, 8000) for _ in range(32)]),
    "decode 256 of 100 to 2000": ([1] * 256, [random.randint(100, 2000) for _ in range(256)]),
    "prefill 1 x 2048": ([2048], [2048]),
    "prefill 4 x 2048": ([2048] * 4, [2048] * 4),
    "prefill 1 x 500 at 1000": ([500], [1500]),
    "63 decodes + 1985": ([1] * 63 + [1985], [1024] * 63 + [1985]),
}
KNOWN = {  # case -> best of FlashInfer 0.6.6 and FlashAttention-4 4.0.0b36, ms, 32 query and 8 KV heads, same card
    "decode 1 x 4096": 0.017,
    "decode 64 x 1024": 0.100,
    "decode 256 x 600": 0.223,
    "decode 32 of 16 to 8000": 0.207,
    "prefill 1 x 2048": 0.080,
    "prefill 4 x 2048": 0.290,
    "63 decodes + 1985": 0.187,
}
DECODE = [
    DecodeConfig(n, stages, warps, programs)
    for n, stages, warps, programs in (
        (64, 3, 4, 2), (64, 3, 4, 3), (64, 2, 4, 3), (64, 2, 4, 4), (64, 4, 4, 2), (32, 3, 4, 4), (32, 4, 4, 4),
        (128, 2, 4, 2), (128, 2, 8, 2), (128, 3, 8, 1), (64, 3, 2, 3), (32, 3, 2, 5), (32, 4, 2, 4), (64, 4, 8, 2),
    )
]  # fmt: skip
PREFILL = [
    PrefillConfig(m, n, stages, warps)
    for m, n, stages, warps in (
        (128, 64, 3, 8), (128, 64, 2, 8), (128, 128, 2, 8), (128, 128, 3, 8), (64, 64, 3, 4), (64, 128, 2, 4),
        (128, 64, 4, 8), (128, 32, 4, 8), (64, 64, 2, 4),
    )
]  # fmt: skip


def make(case: str, heads: int, kv_heads: int, layers: int) -> tuple[PagedKVCache, ForwardInputs, torch.Tensor]:
    query_lens, seq_lens = CASES[case]
    config = ModelConfig(64, 8, layers, heads, kv_heads, 128, 8, 64)
    blocks = sum(-(-n // 16) for n in seq_lens)
    cache = PagedKVCache(config, blocks + 1, 16, dtype=torch.bfloat16, device="cuda")
    cache.blocks.normal_()
    order = torch.randperm(blocks).tolist()
    width = max(-(-n // 16) for n in seq_lens)
    table = [[order.pop() for _ in range(-(-n // 16))] for n in seq_lens]
    rows = torch.tensor([row + [0] * (width - len(row)) for row in table], dtype=torch.int32, device="cuda")
    unread = torch.zeros(0, dtype=torch.int64, device="cuda")
    inputs = ForwardInputs(
        unread, unread, unread,
        torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32, device="cuda"),
        torch.tensor(seq_lens, dtype=torch.int32, device="cuda"), rows,
        query_lens, seq_lens, query_lens.count(1),
    )  # fmt: skip
    return cache, inputs, torch.randn(sum(query_lens), heads, 128, device="cuda", dtype=torch.bfloat16)


def floor_ms(case: str, heads: int, kv_heads: int) -> float:
    """The larger of reading the cache once and of the products' operations."""
    query_lens, seq_lens = CASES[case]
    read = sum(seq_lens) * kv_heads * 128 * 4 / READ_BYTES_PER_S
    pairs = sum(n * (length - n) + n * (n + 1) / 2 for n, length in zip(query_lens, seq_lens, strict=True))
    return 1e3 * max(read, 4 * heads * 128 * pairs / FLOPS)


def time_ms(run: Callable[[int], object], layers: int) -> float:
    """Of one call, in a graph of one call a layer; best of 5 replays of several."""
    for layer in range(min(2, layers)):
        run(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            run(layer)
    best = float("inf")
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(3):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 3 / layers)
    return best


def _attend(backend: TritonBackend, query: torch.Tensor, cache: PagedKVCache, plan: object, layer: int) -> torch.Tensor:
    return backend.attend(query, layer, cache, plan)


def measure(case: str, heads: int, kv_heads: int, label: str) -> dict[str, object]:
    """All launch sizes of one case; prints the three best."""
    size = sum(CASES[case][1]) * kv_heads * 128 * 4
    layers = max(4, min(64, 400_000_000 // size))
    cache, inputs, query = make(case, heads, kv_heads, layers)
    mixed = 0 < inputs.num_decodes < len(inputs.seq_lens)
    configs: list[tuple[DecodeConfig | None, PrefillConfig | None]]
    if inputs.num_decodes and not mixed:
        configs = [(config, None) for config in DECODE]
    else:
        configs = [(None, config) for config in (PREFILL[:5] if mixed else PREFILL)]
    found = []
    for decode, prefill in configs:
        backend = TritonBackend(decode, prefill)
        try:
            plan = backend.prepare(inputs, cache)
            ms = time_ms(functools.partial(_attend, backend, query, cache, plan), layers)
        except Exception as error:  # a launch size that does not fit this card
            print("  failed", decode or prefill, str(error)[:80], flush=True)
            continue
        config = decode or prefill
        assert config is not None
        found.append({"ms": ms, **asdict(config)})
    found.sort(key=lambda entry: float(entry["ms"]))
    floor, known = floor_ms(case, heads, kv_heads), KNOWN.get(case) if heads == 32 else None
    print(f"{label} {case}: floor {floor:.4f} ms" + (f", best known {known:.3f}" if known else ""), flush=True)
    for entry in found[:4]:
        rest = {key: value for key, value in entry.items() if key != "ms"}
        print(f"    {entry['ms']:.4f} ms  {float(entry['ms']) / floor:.2f} x floor  {rest}", flush=True)
    return {"case": case, "shape": label, "floor_ms": floor, "best_known_ms": known, "measured": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="cases, comma-separated prefixes")
    args = parser.parse_args()
    results = []
    for label, heads, kv_heads in (("llama-3.1-8b", 32, 8), ("qwen3-0.6b", 16, 8)):
        for case in CASES:
            if any(case.startswith(prefix) for prefix in args.only.split(",")):
                results.append(measure(case, heads, kv_heads, label))
    save({**header("benchmarks.gpu.attention"), "results": results}, out_folder() / "gpu-attention.json")


if __name__ == "__main__":
    main()
