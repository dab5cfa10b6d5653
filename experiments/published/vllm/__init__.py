"""How much of the KV memory is used, and what rate can be sustained, by how memory is set aside."""

from __future__ import annotations

from experiments.fidelity.capacity import saturated
from experiments.published.study import Study
from experiments.records import Run
from experiments.timeline import timeline

UTILISATION = {"max": 20.4, "pow2": 26.8, "oracle": 38.2, "paged": 96.3}
"""Figure 2: the share of the KV memory that holds tokens, in percent."""


def experiment(study: Study) -> None:
    runs = {name: study.simulate({"policies": policies}) for name, policies in study.values["schemes"].items()}
    share = {name: 100 * utilisation(run) for name, run in runs.items() if name in UTILISATION}
    rate = {name: saturated(run) for name, run in runs.items()}
    study.find(
        "KV memory that holds tokens: paged, then Orca with true lengths, powers of two, the maximum",
        "figure 2", _listed(UTILISATION, "%"), _listed(share, "%"),
        "the same order, and paged above 90 %",
        sorted(share, key=share.__getitem__) == list(UTILISATION) and share["paged"] > 90,
    )  # fmt: skip
    study.find(
        "Setting memory aside leaves most of it empty",
        "figure 2", _listed(UTILISATION, "%"), _listed(share, "%"),
        "each within 10 points of the published",
        all(abs(share[name] - published) <= 10 for name, published in UTILISATION.items()),
    )  # fmt: skip
    order = ["static", "max", "pow2", "oracle", "paged"]
    study.find(
        "Sustained rates: vLLM above Orca (Oracle), (Pow2), (Max), and these above FasterTransformer",
        "section 6.2, figure 12", " < ".join(order), _listed({name: rate[name] for name in order}, "/s", 2),
        "the same order", sorted(order, key=rate.__getitem__) == order,
    )  # fmt: skip
    for name, low, high in (("oracle", 1.7, 2.7), ("max", 2.7, 8.0)):
        times = rate["paged"] / rate[name]
        study.find(
            f"vLLM sustains a higher rate than Orca ({name.title()}) on ShareGPT",
            "section 6.2, figure 12", f"{low} to {high} times", f"{times:.2f} times", "within the published range",
            low <= times <= high,
        )  # fmt: skip


def utilisation(run: Run) -> float:
    """Mean share of the KV memory that holds tokens, while somebody waits and as many have ended as once ran.

    Of each request's last block half is counted.
    """
    states = timeline(run)
    ends = run.requests["finish_ns"].sort_values(ignore_index=True)
    begin = int(ends.iloc[min(int(states["running"].max()), len(ends) // 2)])
    t, waiting = states["t_ns"].to_numpy(), states["waiting"].to_numpy()
    full = (t >= begin) & (waiting > 0)
    lasting = (t[1:] - t[:-1]) * full[:-1]
    block = run.limits["block_size"]
    tokens = states["kv_blocks"].to_numpy() * block - states["running"].to_numpy() * block / 2
    return float((tokens[:-1] * lasting).sum() / lasting.sum()) / (run.limits["num_blocks"] * block)


def _listed(values: dict[str, float], unit: str, digits: int = 1) -> str:
    return ", ".join(f"{name} {value:.{digits}f}{unit}" for name, value in values.items())
