"""Where the GPU's time goes: how long it idles between steps, and which kernels take what.

The profiler sees every kernel, those of CUDA graphs too, and slows the host a little, so that true idle shares are
rather lower than these. The share of a steady stretch is 1 - (union of the kernels' intervals) / (its span).
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.engines import Bench
from benchmarks.gpu.works import Details, Figures, Sizes
from runtime.sequence import Output

TOP = 25
NAME_WIDTH = 160
LEAD_IN = 8  # output tokens of everybody before the profile begins
EDGE = 0.15  # of a window, left out at both ends, where the profiler itself holds the host up
WAIT_S = 60


@dataclass(frozen=True, slots=True)
class Kernel:
    """One piece of work on the device; times in microseconds."""

    name: str
    start: float
    end: float


def device_kernels(profiler: profile) -> list[Kernel]:
    """Kernels, copies and fills of a finished profile, in order of their start."""
    events = profiler.events() or []
    kernels = [
        Kernel(event.name[:NAME_WIDTH], event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return sorted(kernels, key=lambda kernel: kernel.start)


def inner(kernels: list[Kernel], edge: float) -> list[Kernel]:
    """Without those that begin in the first or last `edge` of the span."""
    if not kernels:
        return []
    start, end = kernels[0].start, max(kernel.end for kernel in kernels)
    cut = edge * (end - start)
    return [kernel for kernel in kernels if start + cut <= kernel.start <= end - cut]


def span_and_busy(kernels: Iterable[Kernel]) -> tuple[float, float]:
    """Microseconds from the first start to the last end, and of them how many had a kernel running.

    `kernels` ascend by their start; they may overlap.
    """
    first: float | None = None
    reached = busy = 0.0
    for kernel in kernels:
        if first is None:
            first = reached = kernel.start
        busy += max(0.0, kernel.end - max(kernel.start, reached))
        reached = max(reached, kernel.end)
    return (0.0, 0.0) if first is None else (reached - first, busy)


def summary(kernels: list[Kernel], step_us: float | None = None) -> dict[str, Any]:
    """Idle share, the longest gaps, and the kernels by their total time. `step_us`: of a step, for figures a step."""
    span, busy = span_and_busy(kernels)
    if span <= 0:
        return {"note": "the profiler saw no work on a GPU"}
    totals: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        totals[kernel.name].append(kernel.end - kernel.start)
    steps = None if step_us is None else span / step_us
    ranked = sorted(totals.items(), key=lambda item: -sum(item[1]))
    return {
        "idle_percent": 100 * (1 - busy / span),
        "span_us": round(span, 1),
        "busy_us": round(busy, 1),
        "launches": len(kernels),
        "steps": None if steps is None else round(steps, 1),
        "gaps_over_20us": sum(gap > 20 for gap in _gaps(kernels)),
        "longest_gap_us": round(max(_gaps(kernels), default=0.0), 1),
        "top": [
            {
                "name": name,
                "total_us": round(sum(times), 1),
                "count": len(times),
                "mean_us": round(sum(times) / len(times), 2),
                "percent_of_busy": round(100 * sum(times) / busy, 2),
                **({} if steps is None else {"us_per_step": round(sum(times) / steps, 1)}),
            }
            for name, times in ranked[:TOP]
        ],
    }


def _gaps(kernels: list[Kernel]) -> list[float]:
    gaps, reached = [], kernels[0].start
    for kernel in kernels:
        if kernel.start > reached:
            gaps.append(kernel.start - reached)
        reached = max(reached, kernel.end)
    return gaps


def new_profiler(device: torch.device) -> profile:
    """Of the GPU's work alone: following the host's operations would slow it down."""
    return profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU])


class Progress:
    """Counts one request's outputs, and lets another thread wait for the n-th."""

    def __init__(self) -> None:
        self.stamps: list[int] = []
        self.error: str | None = None
        self.ended = False
        self._changed = threading.Condition()
        self._wanted = 0

    def __call__(self, output: Output) -> None:
        self.stamps.append(time.monotonic_ns())
        if output.finish_reason is not None or len(self.stamps) == self._wanted:
            with self._changed:
                self.ended, self.error = output.finish_reason is not None, output.error
                self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        """Until there are so many outputs. Raises RuntimeError where there will not be."""
        with self._changed:
            self._wanted = count
            there = self._changed.wait_for(lambda: self.ended or len(self.stamps) >= count, WAIT_S)
        if not there or len(self.stamps) < count:
            raise RuntimeError(f"{len(self.stamps)} outputs instead of {count}: {self.error}")


def profile_decode(bench: Bench, batch: int, prompt: int, steps: int) -> dict[str, Any]:
    """The summary of `steps` steps in which `batch` requests decode and nothing else happens."""
    engine = bench.engine()
    most = engine.limits.max_model_len - prompt
    last = Progress()
    ids = [bench.submit(one, most, _nobody) for one in bench.prompts([prompt] * (batch - 1))]
    ids.append(bench.submit(bench.prompts([prompt])[0], most, last))
    try:
        last.wait_for(LEAD_IN)
        profiler = new_profiler(bench.device)
        profiler.start()
        began = len(last.stamps)
        last.wait_for(began + int(steps / (1 - 2 * EDGE)))
        over = len(last.stamps)
        profiler.stop()
    finally:
        for request_id in ids:
            engine.cancel(request_id)
    stamps = last.stamps[began:over]
    step_us = statistics.median(b - a for a, b in itertools.pairwise(stamps)) / 1e3
    found = summary(inner(device_kernels(profiler), EDGE), step_us)
    host = getattr(engine, "host_ns_per_step", None)
    return {"step_us": round(step_us, 1), **({} if host is None else {"host_ns_per_step": host}), **found}


def _nobody(output: Output) -> None:
    """Listens to requests that are only there for company."""


def profile_prefill(bench: Bench, length: int) -> dict[str, Any]:
    """The summary of one prompt's only step."""
    bench.engine()
    prompts = bench.prompts([length])
    profiler = new_profiler(bench.device)
    profiler.start()
    seconds = bench.generate(prompts, [1])
    bench.synchronize()
    profiler.stop()
    return {"generate_us": round(1e6 * seconds, 1), **summary(device_kernels(profiler))}


def idle(bench: Bench, sizes: Sizes, found: Figures) -> Details:
    """Steady decode at several batches, and one prefill."""
    profile_prefill(bench, sizes.profile_prefill)  # the profiler's own start takes long the first time
    profiles = {f"prefill_1x{sizes.profile_prefill}": profile_prefill(bench, sizes.profile_prefill)}
    for batch in sizes.profile_batches:
        one = profile_decode(bench, batch, sizes.profile_prompt, sizes.profile_steps)
        profiles[f"decode_b{batch}"] = one
        if "idle_percent" in one:
            found[f"idle_pct_b{batch}"] = one["idle_percent"]
            print(f"  batch {batch}: {one['idle_percent']:.2f}% idle of {one['step_us']:,.0f} us a step", flush=True)
        else:
            print(f"  batch {batch}: {one['note']}", flush=True)
    return {"profiles": profiles}
