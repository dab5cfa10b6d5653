"""How far apart the service of tenants grows under fair and other queues."""

from __future__ import annotations

import pandas as pd

from experiments.fairness import service_received
from experiments.metrics import summarize
from experiments.published.study import Study
from experiments.records import Run
from experiments.workloads import Workload, WorkloadSpec, make_workload
from experiments.workloads.mixing import mix


def experiment(study: Study) -> None:
    queues, memory = study.values["queues"], study.run["limits"]["num_blocks"] * study.run["limits"]["block_size"]
    bound = 2 * max(study.values["tokens"][0], 2 * memory)
    workload, begin, end = _clients(study, "overload")
    runs = {
        name: study.simulate({"policies": {"queue": queue}}, workload)
        for name, queue in queues.items()
        if name != "lcf"
    }
    apart = {name: difference(run, begin, end) for name, run in runs.items()}
    study.find(
        "Two overloaded clients: the difference of their service stays bounded under VTC",
        "section 5.2, figure 3; the bound: section 4 (theorem not verified)",
        f"at most 2U = {bound:,}", f"{apart['vtc'].max():,.0f} at most",
        "never above 2U", apart["vtc"].max() <= bound,
    )  # fmt: skip
    halves = [float(apart["fcfs"].loc[: begin + (end - begin) // 2].iloc[-1]), float(apart["fcfs"].iloc[-1])]
    study.find(
        "and grows with time under FCFS",
        "section 5.2, figure 3", "linear", f"{halves[0]:,.0f} after half the time, {halves[1]:,.0f} after all",
        "above 2U at the end, and 1.6 to 2.4 times what it was after half the time",
        halves[1] > bound and 1.6 <= halves[1] / halves[0] <= 2.4,
    )  # fmt: skip
    rates = {name: summarize(run)["total_token_throughput"] for name, run in runs.items()}
    study.find(
        "A limit on requests a minute keeps them together and wastes capacity",
        "section 5.3, figure 13 (RPM, on the Arena log)", "throughput far below",
        f"{rates['rpm']:,.0f} against {rates['vtc']:,.0f} tokens/s",
        "bounded like VTC, and under 0.8 of its throughput",
        apart["rpm"].max() <= bound and rates["rpm"] < 0.8 * rates["vtc"],
    )  # fmt: skip
    workload, begin, end = _clients(study, "late")
    late = {
        name: difference(study.simulate({"policies": {"queue": queues[name]}}, workload), begin, end)
        for name in ("vtc", "lcf")
    }
    study.find(
        "A client that comes late is given its share under VTC, and all that it missed under LCF",
        "section 5.2: figures 5 and 6 (on/off, VTC), 10 (LCF)", "bounded, and not",
        ", ".join(f"{name} {apart.max():,.0f}" for name, apart in late.items()),
        f"VTC at most 2U = {bound:,} once both are there, LCF above",
        late["vtc"].max() <= bound < late["lcf"].max(),
    )  # fmt: skip
    arena = study.values["arena"]
    gaps = {
        name: summarize(study.simulate({"workload": arena, "policies": {"queue": queues[name]}}))["largest_service_gap"]
        for name in ("vtc", "fcfs")
    }
    study.find(
        "On Chatbot Arena's clients, overloaded, VTC's largest difference among who waits is far below FCFS's",
        "section 5.3 (table of differences, number not verified)", "VTC far below",
        f"{gaps['vtc'] or 0:,.0f} against {gaps['fcfs'] or 0:,.0f}", "under half",
        (gaps["vtc"] or 0) < (gaps["fcfs"] or 0) / 2,
    )  # fmt: skip


def difference(run: Run, begin_ns: int, end_ns: int) -> pd.Series[float]:
    """By how much one was given more than the other since `begin_ns`: the largest range of it, up to each time."""
    service = service_received(run)
    ahead = (service.iloc[:, 0] - service.iloc[:, 1]).loc[begin_ns:end_ns]
    ahead = ahead - float(ahead.iloc[0])
    return (ahead.cummax() - ahead.cummin()).rename("difference")


def _clients(study: Study, which: str) -> tuple[Workload, int, int]:
    """Two clients' requests, and the time in which both have some waiting: from the later's coming on."""
    inputs, outputs = study.values["tokens"]
    seconds, parts, starts = study.values["seconds"], [], []
    for name, client in study.values[which].items():
        start = client["from_share"] * seconds
        spec = WorkloadSpec(
            name="fixed", prompt_tokens=inputs, output_tokens=outputs, rate=client["rate"], arrivals="poisson",
            duration_s=seconds - start, seed=study.values["seed"],
        )  # fmt: skip
        made = make_workload(spec)
        starts.append(round(1e9 * start))
        parts.append(made.replace(arrival_ns=made.arrival_ns + starts[-1], tenant=[name] * len(made)))
    # a while after the later one has come, it has requests waiting
    begin = max(starts) + round(1e9 * study.values["settle_share"] * seconds)
    return mix(parts), begin, round(1e9 * seconds)
