"""Normalised latency over the rate: run to completion, a multi-level feedback queue, and one with skip-join."""

from __future__ import annotations

import numpy as np

from experiments.metrics import per_request
from experiments.published.study import Study
from experiments.records import Run

ORDER = ("fcfs", "naive", "skip_join")


def experiment(study: Study) -> None:
    runs = {name: study.simulate({"policies": policies}) for name, policies in study.values["policies"].items()}
    latency = {name: normalised_ms(run) for name, run in runs.items()}
    study.find(
        "Normalised latency near saturation: FCFS (run to completion) above naive MLFQ above skip-join MLFQ",
        "evaluation, ablation of skip-join (number not verified)", " > ".join(ORDER),
        ", ".join(f"{name} {latency[name]:.1f} ms/token" for name in ORDER),
        "the same order", sorted(ORDER, key=latency.__getitem__, reverse=True) == list(ORDER),
    )  # fmt: skip
    done = per_request(runs["fcfs"])
    share = float(done["queue_ms"].sum() / done["e2e_ms"].sum())
    study.find(
        "Queueing is most of the latency under FCFS",
        "introduction (number not verified)", "up to 90 %",
        f"{100 * share:.0f} %", "50 % to 95 %", 0.5 <= share <= 0.95,
    )  # fmt: skip
    worst = {name: float(np.percentile(per_request(run)["e2e_ms"], 99)) / 1e3 for name, run in runs.items()}
    study.find(
        "Promoting who waits (alpha) keeps the last from starving",
        "evaluation, starvation (number not verified)", "shorter tail with alpha",
        f"p99 {worst['skip_join']:.1f} s, without {worst['starving']:.1f} s",
        "p99 with alpha below that without", worst["skip_join"] < worst["starving"],
    )  # fmt: skip


def normalised_ms(run: Run) -> float:
    """The mean over requests of the end-to-end latency per output token."""
    done = per_request(run)
    return float((done["e2e_ms"] / done["output_tokens"]).mean())
