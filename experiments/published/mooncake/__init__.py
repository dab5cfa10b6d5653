"""What a prefix cache hits by its size, and the time to the first token by router."""

from __future__ import annotations

import os
from pathlib import Path

from experiments.published.mooncake.routers import by_router
from experiments.published.study import Study
from experiments.workloads import Workload, WorkloadSpec, load, make_workload
from experiments.workloads.prefix_sharing import PrefixSharing


def experiment(study: Study) -> None:
    _capacity(study)
    ttft, hits = by_router(study.values["sessions"], study.values["seed"])
    published = {"chance": 19.65, "queue": 5.27, "caches": 3.58, "conductor": 3.07}
    shown = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in ttft.items())
    study.find(
        "Mean time to first token: the conductor, caches alone, the shortest queue, chance",
        "figure 5", ", ".join(f"{name} {seconds} s" for name, seconds in published.items()), shown,
        "the same order", sorted(ttft, key=ttft.__getitem__) == list(published)[::-1],
    )  # fmt: skip
    for name, within in (("queue", 0.15), ("caches", 0.1)):
        ours, wanted = ttft[name] / ttft["conductor"], published[name] / published["conductor"]
        study.find(
            f"By how much the conductor beats {'the shortest queue' if name == 'queue' else 'caches alone'}",
            "figure 5", f"{wanted:.2f} times", f"{ours:.2f} times", f"within {100 * within:.0f} %",
            abs(ours / wanted - 1) <= within,
        )  # fmt: skip
    study.find(
        "The more a router looks at caches, the more they hit", "not a figure: why those of figure 5 differ",
        "in that order",
        ", ".join(f"{name} {share:.3f}" for name, share in hits.items()), "in that order",
        list(hits.values()) == sorted(hits.values()),
    )  # fmt: skip


def _capacity(study: Study) -> None:
    """LRU in 512-token blocks, token-weighted, on the conversation trace or what stands for it."""
    small, large = (round(tokens / 512) for tokens in study.values["capacities"])
    workload, source = _conversation(study)
    sharing = PrefixSharing(workload.hash_block, [small, large])
    for tokens, ids in zip(workload.prompt_tokens.tolist(), workload.hash_ids or (), strict=True):
        sharing.add(tokens, ids)
    found = sharing.figures()
    at = {blocks: rate / found["hit_rate"] for blocks, rate in found["lru"].items()}
    study.find(
        "Of the hits that an endless cache has, one of 3 million tokens has a part (conversation trace, LRU)",
        "figure 9", "41 %", f"{100 * at[small]:.1f} % ({source})", "within 5 points", abs(at[small] - 0.41) <= 0.05,
    )  # fmt: skip
    study.find(
        "and one of 50 million tokens has nearly all", "figure 9", "about all", f"{100 * at[large]:.1f} % ({source})",
        "above 95 %", at[large] > 0.95,
    )  # fmt: skip


def _conversation(study: Study) -> tuple[Workload, str]:
    folder = os.environ.get("DIPTYCH_TRACES")
    path = Path(folder or ".") / "mooncake" / "conversation_trace.jsonl.gz"
    if folder and path.is_file() and not study.reduced:
        return load(path), "the trace"
    return make_workload(WorkloadSpec(name="prefix-chat", duration_s=3537, seed=study.values["seed"])), "its generator"
