"""The rate that keeps a limit on the time between tokens, and the stalls of decodes behind prompts."""

from __future__ import annotations

import numpy as np

from experiments.metrics import latencies_ms, per_request
from experiments.published.search import highest_rate
from experiments.published.study import Study


def experiment(study: Study) -> None:
    values = study.values
    capacity = {name: _capacity(study, name) for name in values["schedulers"]}
    times = capacity["sarathi"] / capacity["vllm"]
    shown = ", ".join(f"{name} {rate:.2f}/s" for name, rate in capacity.items())
    study.find(
        f"Under a limit of {values['tbt_ms']} ms on the 99th percentile of the time between tokens, Sarathi-Serve has "
        "a higher capacity than vLLM and Orca",
        "figure 10", "Sarathi-Serve first", shown, "above both",
        capacity["sarathi"] > max(capacity["vllm"], capacity["orca"]),
    )  # fmt: skip
    study.find(
        "By up to 2.6 times, with a 7B model on one A100",
        "abstract", "2.6 times vLLM's", f"{times:.2f} times vLLM's", "1.5 to 4 times", 1.5 <= times <= 4,
    )  # fmt: skip
    rate = values["stall_share"] * capacity["sarathi"]
    runs = {
        name: study.simulate({"workload": {"rate": rate}, "policies": policies})
        for name, policies in values["schedulers"].items()
    }
    longest = {name: float(latencies_ms(run)["itl"].max()) for name, run in runs.items()}
    study.find(
        "Prompts stall the decodes under vLLM, and not under Sarathi-Serve",
        "section 3.2, figure 1a (of Yi-34B)", "stalls of seconds, and none",
        ", ".join(f"longest {n} {v:.0f} ms" for n, v in longest.items()),
        "vLLM's longest gap between tokens is 5 times Sarathi-Serve's or more",
        longest["vllm"] >= 5 * longest["sarathi"],
    )  # fmt: skip
    ttft = {name: float(np.median(per_request(run)["ttft_ms"])) for name, run in runs.items()}
    tbt = {name: float(np.percentile(latencies_ms(run)["itl"], 99)) for name, run in runs.items()}
    study.find(
        "It pays with a somewhat later first token, and gains far more in the time between tokens",
        "not in one figure (number not verified)", "TTFT a little worse, TBT far better",
        f"median TTFT {ttft['sarathi']:.0f} against {ttft['vllm']:.0f} ms, "
        f"p99 TBT {tbt['sarathi']:.0f} against {tbt['vllm']:.0f} ms",
        "TTFT later than vLLM's, p99 TBT under half",
        ttft["sarathi"] > ttft["vllm"] and tbt["sarathi"] < tbt["vllm"] / 2,
    )  # fmt: skip


def _capacity(study: Study, scheduler: str) -> float:
    """The highest rate with the 99th percentile of TBT in the limit and a median queueing delay under 2 s."""

    def holds(rate: float) -> bool:
        run = study.simulate({"workload": {"rate": rate}, "policies": study.values["schedulers"][scheduler]})
        late = float(np.percentile(latencies_ms(run)["itl"], 99)) > study.values["tbt_ms"]
        return not late and float(per_request(run)["queue_ms"].median()) < 2_000

    low, high = study.values["rates"]
    return highest_rate(holds, low, high, study.values["within"])
