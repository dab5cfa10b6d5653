"""The offline works: decode steps, prefills, and two sets of requests that are all there at once."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.engines import MIXED, STEADY, Bench

Figures = dict[str, float]
"""Metrics by key. A part enters each one when it has it, so that a part that fails keeps those before."""
Details = dict[str, Any]
"""Everything else worth keeping."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. All lengths in tokens."""

    decode_batches: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
    decode_prompt: int = 512
    decode_steps: int = 128
    decode_repeats: int = 2
    prefills: tuple[int, ...] = (512, 2048)
    prefill_repeats: int = 5
    prefill_many: tuple[int, int] = (32, 2048)  # prompts, their length
    prefill_many_repeats: int = 2
    offline_requests: int = 256
    offline_lengths: tuple[int, int] = (100, 1024)
    azure_requests: int = 1000
    azure_cut: tuple[int, int] = (3500, 4000)  # longest input, longest input and output
    online: tuple[tuple[int, int], ...] = ((6, 300), (12, 700), (16, 900))  # requests/s, requests
    profile_batches: tuple[int, ...] = (1, 64, 256)
    profile_prompt: int = 512
    profile_steps: int = 50
    profile_prefill: int = 2048


FULL = Sizes()
SMALL = Sizes(
    decode_batches=(1, 4),
    decode_prompt=32,
    decode_steps=8,
    prefills=(64,),
    prefill_repeats=2,
    prefill_many=(4, 64),
    offline_requests=8,
    offline_lengths=(8, 32),
    azure_requests=12,
    azure_cut=(100, 120),
    online=((50, 8),),
    profile_batches=(4,),
    profile_prompt=32,
    profile_steps=10,
    profile_prefill=64,
)


def decode(bench: Bench, sizes: Sizes, found: Figures) -> Details:
    """A decode step: (time for n + 1 output tokens - time for 1) / n, each the best of its repeats."""
    bench.engine()
    times: dict[str, Any] = {}
    for batch in sizes.decode_batches:
        long, short = (
            [
                bench.generate(bench.prompts([sizes.decode_prompt] * batch), [tokens] * batch)
                for _ in range(sizes.decode_repeats)
            ]
            for tokens in (sizes.decode_steps + 1, 1)
        )
        found[f"decode_ms_b{batch}"] = 1e3 * (min(long) - min(short)) / sizes.decode_steps
        times[str(batch)] = {"long_s": long, "short_s": short}
        print(f"  batch {batch}: {found[f'decode_ms_b{batch}']:.2f} ms", flush=True)
    return {"times": times}


def prefill(bench: Bench, sizes: Sizes, found: Figures) -> Details:
    """One prompt, and many at once, with one output token each; the best of several."""
    bench.engine()
    times: dict[str, list[float]] = {}
    for length in sizes.prefills:
        name = f"1x{length}"
        times[name] = [bench.generate(bench.prompts([length]), [1]) for _ in range(sizes.prefill_repeats)]
        found[f"prefill_ms_{name}"] = 1e3 * min(times[name])
        print(f"  {name}: {1e3 * min(times[name]):.1f} ms", flush=True)
    count, length = sizes.prefill_many
    name = f"{count}x{length}"
    times[name] = [
        bench.generate(bench.prompts([length] * count), [1] * count) for _ in range(sizes.prefill_many_repeats)
    ]
    found[f"prefill_tok_s_{name}"] = count * length / min(times[name])
    print(f"  {name}: {found[f'prefill_tok_s_{name}']:,.0f} tokens/s", flush=True)
    return {"times": times}


def offline(bench: Bench, sizes: Sizes, found: Figures) -> Details:
    """Requests of uniform lengths, all at once."""
    draw = random.Random(0)
    low, high = sizes.offline_lengths
    lengths = [(draw.randint(low, high), draw.randint(low, high)) for _ in range(sizes.offline_requests)]
    return _all_at_once(bench, found, lengths, f"offline{sizes.offline_requests}", STEADY)


def azure(bench: Bench, sizes: Sizes, found: Figures, lengths: list[tuple[int, int]]) -> Details:
    """Requests with a trace's lengths, all at once."""
    return _all_at_once(bench, found, lengths[: sizes.azure_requests], "azure", MIXED)


def _all_at_once(bench: Bench, found: Figures, lengths: list[tuple[int, int]], name: str, scheduler: str) -> Details:
    bench.engine(scheduler)
    outputs = [output for _, output in lengths]
    seconds = bench.generate(bench.prompts([prompt for prompt, _ in lengths]), outputs)
    found[f"{name}_out_tok_s"] = sum(outputs) / seconds
    found[f"{name}_req_s"] = len(lengths) / seconds
    print(f"  {sum(outputs) / seconds:,.0f} output tokens/s, {len(lengths) / seconds:.1f} requests/s", flush=True)
    prompts = sum(prompt for prompt, _ in lengths)
    return {
        "requests": len(lengths),
        "prompt_tokens": prompts,
        "output_tokens": sum(outputs),
        "generate_s": seconds,
    }
