"""Prompt and output lengths of the Azure 2023 conversation trace, from a file or from the generator fitted to it; and
when requests arrive."""

from __future__ import annotations

import random
from pathlib import Path

TRACE_ROWS = 1000  # as many as any work needs


def read_lengths(path: Path | None, longest_input: int, longest: int) -> tuple[list[tuple[int, int]], str]:
    """(input, output) tokens of the first `TRACE_ROWS` requests, cut, and where they are from: "trace" or "generated".

    Inputs are cut to `longest_input`, then outputs to what `longest` leaves. `path` is the trace as published, or any
    file that the project's loaders know.
    """
    from experiments.workloads import WorkloadSpec, load, make_workload

    if path is not None:
        workload, source = load(path), "trace"
    else:
        workload, source = make_workload(WorkloadSpec(name="chat", n=TRACE_ROWS)), "generated"
    pairs = zip(workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True)
    return [cut(*pair, longest_input, longest) for pair in list(pairs)[:TRACE_ROWS]], source


def cut(prompt: int, output: int, longest_input: int, longest: int) -> tuple[int, int]:
    """One request within the limits."""
    prompt = min(prompt, longest_input)
    return prompt, min(output, longest - prompt)


def prepare(trace: Path, out: Path) -> int:
    """Write the part of a trace that the benchmark needs as a small file. Returns how many requests it has."""
    from experiments.workloads import load
    from experiments.workloads.jsonl import write_jsonl

    workload = load(trace).slice(TRACE_ROWS)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(workload, out)
    return len(workload)


def poisson_ns(rate: float, count: int) -> list[int]:
    """Arrival times in nanoseconds, the first one a gap after zero."""
    draw, now, times = random.Random(1), 0.0, []
    for _ in range(count):
        now += draw.expovariate(rate)
        times.append(int(now * 1e9))
    return times
