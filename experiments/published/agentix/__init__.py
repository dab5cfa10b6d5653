"""The sum of waits of four programs on two slots."""

from __future__ import annotations

from pathlib import Path

from experiments.published.study import Study

FILE = Path(__file__).with_name("figure2.jsonl")
NAMES = {"fcfs": "FCFS", "mlfq": "MLFQ", "plas": "PLAS", "charged_at_once": "PLAS, charged while a call runs"}


def experiment(study: Study) -> None:
    waits = {name: _waits(study, policies) for name, policies in study.values["policies"].items()}
    for name, published in study.values["published"].items():
        study.find(
            f"{NAMES[name]} on the programs A, B, C, D", "figure 2", f"waits of {published}", f"{waits[name]:g}",
            "the same number", waits[name] == published,
        )  # fmt: skip
    study.find(
        "PLAS waits less than MLFQ and FCFS", "figure 2", "12 < 18 = 18",
        f"{waits['plas']:g} < {waits['mlfq']:g} = {waits['fcfs']:g}", "the same order",
        waits["plas"] < waits["mlfq"] == waits["fcfs"],
    )  # fmt: skip


def _waits(study: Study, policies: dict[str, str]) -> float:
    run = study.simulate({"workload": {"name": str(FILE)}, "policies": policies})
    rows = run.requests
    served = rows["output_tokens"].sum()
    return float((rows["finish_ns"] - rows["arrival_ns"]).sum() / 1e6 - served)
