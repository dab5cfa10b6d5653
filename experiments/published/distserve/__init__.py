"""Attainment of objectives with prefills and decodes on the same replicas, and on ones of their own."""

from __future__ import annotations

from typing import Any

from experiments.metrics import summarize
from experiments.published.search import highest_rate
from experiments.published.study import Study

WANTED = 0.9


def experiment(study: Study) -> None:
    cases = study.values["cases"]
    rates = {
        case: {name: _rate(study, fields, over) for name, over in study.values["systems"].items()}
        for case, fields in cases.items()
    }
    for case, (low, high) in study.values["published"].items():
        ours = rates[case]
        times = ours["apart"] / ours["together"]
        study.find(
            f"{case}: the rate per GPU at which 90 % keep their objectives, apart against together (vLLM)",
            study.values["sources"][case], f"{low} times" if low == high else f"{low} to {high} times",
            f"{times:.2f} times ({ours['apart']:.2f} against {ours['together']:.2f}/s)", "above 1.2 times", times > 1.2,
        )  # fmt: skip
    slow = _rate(study, cases[study.values["slow_case"]], study.values["slow_link"])
    fast = rates[study.values["slow_case"]]["apart"]
    study.find(
        "With a slow link between them, keeping them apart loses its gain",
        "section 3.3", "bandwidth must suffice", f"{slow:.2f} against {fast:.2f}/s with NVLink",
        "under 0.8 of it", slow < 0.8 * fast,
    )  # fmt: skip


def _rate(study: Study, case: dict[str, Any], over: dict[str, Any]) -> float:
    def holds(rate: float) -> bool:
        run = study.simulate({"workload": {**case, "rate": rate}, **over})
        return (summarize(run)["slo_attainment"] or 0.0) >= WANTED

    low, high = study.values["rates"]
    return highest_rate(holds, low, high, study.values["within"]) / 2
