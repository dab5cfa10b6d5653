"""A client's run under the JSON keys of `vllm bench serve`, from its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd

from experiments.metrics import COMPLETED, LATENCIES, summarize
from experiments.records import Run
from experiments.token_times import token_times

_SAME = (
    "num_prompts",
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    "max_output_tokens_per_s",
    "max_concurrent_requests",
)


def result_json(
    run: Run,
    slo: Mapping[str, float] | None = None,
    percentiles: Sequence[float] = (50, 90, 95, 99),
    detailed: bool = False,
) -> dict[str, Any]:
    """The result file that `vllm bench serve --save-result` writes, of the same run.

    Args:
        slo: objectives in milliseconds, as its `--goodput`.
        percentiles: which pNN_*_ms to give.
        detailed: the lists of its `--save-detailed`, one value a request in order of request_id, in seconds; without
            the texts, which are not kept.

    What has no value is null. `rtfx` and `tokenizer_id` are for other tasks, or not known to a client.
    """
    summary = summarize(run, slo, percentiles)
    spec = run.spec
    rate = spec["workload"].get("rate")
    statistics = [f"{kind}_{name}_ms" for name in LATENCIES for kind in _kinds(percentiles)]
    found: dict[str, Any] = {
        "date": datetime.fromisoformat(run.info["started_at"]).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat" if spec["api"] == "chat" else "openai",
        "backend": "openai-chat" if spec["api"] == "chat" else "openai",
        "label": None,
        "model_id": spec["model"],
        "tokenizer_id": spec["tokenizer"],
        "request_rate": rate if spec["concurrency"] is None and rate is not None else "inf",
        "burstiness": _burstiness(spec["workload"]),
        "max_concurrency": spec["concurrency"],
        **{key: summary.get(key) for key in _SAME},
        "rtfx": None,
        **{key: summary[key] for key in statistics},
    }
    return found | (_details(run) if detailed else {})


def _kinds(percentiles: Sequence[float]) -> list[str]:
    return ["mean", "median", "std", *(f"p{percentile:g}" for percentile in percentiles)]


def _burstiness(workload: Mapping[str, Any]) -> float:
    """Shape of the gaps' Gamma distribution, 1 / cv^2; 1 where they are not drawn from one, as vLLM has it too."""
    cv = workload.get("cv")
    return 1.0 if cv is None else float(1 / cv**2)


def _details(run: Run) -> dict[str, list[Any]]:
    """One value a request; zero, or empty, for those that did not complete, as vLLM has it."""
    order = np.argsort(run.requests["request_id"].to_numpy(), kind="stable")
    frame = run.requests.iloc[order]
    done = frame["status"].isin(COMPLETED).to_numpy()
    sent = frame["arrival_ns"].to_numpy()

    def since(times: pd.Series[Any]) -> list[float]:
        return np.where(done, (times.to_numpy(np.int64, na_value=0) - sent) / 1e9, 0.0).tolist()

    chunks = token_times(run)
    gaps = [(np.diff(chunks.of(row)) / 1e9).tolist() for row in order.tolist()]
    return {
        "input_lens": frame["prompt_tokens"].tolist(),
        "output_lens": np.where(done, frame["output_tokens"].to_numpy(), 0).tolist(),
        "ttfts": since(frame["first_token_ns"]),
        "itls": [of if completed else [] for of, completed in zip(gaps, done.tolist(), strict=True)],
        "latencies": since(frame["finish_ns"]),
        "start_times": (sent / 1e9).tolist(),
        "errors": frame["error"].tolist(),
    }
