"""Figures that describe a workload: lengths, arrivals, and the best possible prefix hit rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

NS_PER_S = 1_000_000_000
IDC_WINDOWS_S = (1, 10, 60)


def length_stats(tokens: NDArray[Any]) -> dict[str, float]:
    """Mean, quantiles (linear interpolation) and maximum of a column of token counts."""
    if len(tokens) == 0:
        return {"mean": 0.0, "p50": 0.0, "p90": 0.0, "p99": 0.0, "max": 0.0}
    p50, p90, p99 = np.percentile(tokens, (50, 90, 99))
    return {
        "mean": float(np.mean(tokens)),
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "max": float(np.max(tokens)),
    }


def index_of_dispersion(arrival_ns: NDArray[np.int64], window_s: float) -> float:
    """Variance / mean of the arrival counts in windows of `window_s` seconds (1 for a Poisson process).

    Windows start at the first arrival; the last, incomplete window is left out unless it is the only one.
    """
    if len(arrival_ns) == 0:
        return float("nan")
    since_first = arrival_ns - arrival_ns[0]
    window_ns = round(window_s * NS_PER_S)
    whole = max(1, int(since_first[-1] // window_ns))
    index = since_first // window_ns
    counts = np.bincount(index[index < whole], minlength=whole)
    return float(np.var(counts) / np.mean(counts)) if np.any(counts) else float("nan")


def arrival_stats(arrival_ns: NDArray[np.int64]) -> dict[str, float]:
    """Span (s), rate (req/s = 1 / mean gap), CV of the gaps, and the index of dispersion at 1, 10 and 60 s.

    What cannot be computed (fewer than two distinct arrival times) is NaN.
    """
    span_ns = int(arrival_ns[-1] - arrival_ns[0]) if len(arrival_ns) else 0
    stats = {"span_s": span_ns / NS_PER_S, "rate": float("nan"), "cv": float("nan")}
    if span_ns > 0:
        gaps = np.diff(arrival_ns)
        stats["rate"] = len(gaps) * NS_PER_S / span_ns
        stats["cv"] = float(np.std(gaps) / np.mean(gaps))
    for window in IDC_WINDOWS_S:
        stats[f"idc_{window}s"] = index_of_dispersion(arrival_ns, window) if span_ns > 0 else float("nan")
    return stats


def ideal_hit_rate(
    prompt_tokens: Sequence[int] | NDArray[Any], hash_ids: Sequence[Sequence[int]], hash_block: int
) -> float:
    """Token-weighted prefix hit rate of an infinite cache.

    The blocks of a request are looked up from the first one on; counting stops at the first block never seen
    before; the matched tokens are `min(matched blocks * hash_block, prompt_tokens)`. Matching a request that
    is still in flight counts as a hit, so this is an upper bound for any cache.
    """
    seen: set[int] = set()
    matched = 0
    for tokens, ids in zip(np.asarray(prompt_tokens).tolist(), hash_ids, strict=True):
        blocks = next((i for i, block in enumerate(ids) if block not in seen), len(ids))
        matched += min(blocks * hash_block, tokens)
        seen.update(ids)
    total = int(np.sum(prompt_tokens, dtype=np.int64))
    return matched / total if total else 0.0
