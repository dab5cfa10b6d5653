"""Which configuration is best, by trace."""

from __future__ import annotations

from experiments.metrics import summarize
from experiments.published.study import Study


def experiment(study: Study) -> None:
    """Goodput of each configuration on each trace, all at the same share of what the trace can be served at."""
    goodput: dict[str, dict[str, float]] = {}
    for trace, fields in study.values["traces"].items():
        goodput[trace] = {}
        for name, over in study.values["configurations"].items():
            run = study.simulate({"workload": fields, **over})
            goodput[trace][name] = summarize(run, study.values["slo_ms"])["request_goodput"]
    best = {trace: max(of, key=of.__getitem__) for trace, of in goodput.items()}
    study.find(
        "The best configuration changes with the trace",
        "figure 1", "no one configuration is best for all",
        ", ".join(f"{trace}: {name} ({goodput[trace][name]:.2f}/s)" for trace, name in best.items()),
        "at least two different ones are best", len(set(best.values())) > 1,
    )  # fmt: skip
    worst = {
        (of, on): goodput[on][best[on]] / max(goodput[on][best[of]], 1e-9)
        for of in goodput
        for on in goodput
        if of != on
    }
    (of, on), times = max(worst.items(), key=lambda entry: entry[1])
    study.find(
        "Taking one trace's best for another costs up to twice as much",
        "figure 1", "2 times",
        f"{times:.2f} times ({of}'s best on {on})", "1.2 times or more", times >= 1.2,
    )  # fmt: skip
