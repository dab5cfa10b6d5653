"""vLLM's measured figures beside a simulation by our calibration: `python -m benchmarks.across_engines --trace FILE`.

The work is that of `python -m benchmarks.gpu.serving`, under our `mixed`, which is vLLM v1's policy (steps of one kind
alone: `prefill_first`), and within the limits that the calibration was measured in: 128 requests at once and 2,048
tokens a step, where vLLM and our runtime had 256 and 8,192 (vLLM online: 2,048). The simulation knows our runtime's
step times and nothing of vLLM's, so beside each figure is what our runtime measured, where it did: what the simulation
is off from that is its error and the limits', and the rest is the difference between the engines. `outside`: steps of
sizes that were not measured. `--trace`: the Azure 2023 conversation trace, as published.

Writes benchmarks/results/across-engines.json (or into DIPTYCH_BENCH_OUT) and prints the table of docs/fidelity.md.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from benchmarks.gpu.lengths import poisson_ns, read_lengths
from benchmarks.gpu.reference import MODELS, PERCENTILES, VLLM, Metric, metrics
from benchmarks.gpu.results import figure, out_folder
from experiments.metrics import per_request
from experiments.records import Run, RunWriter, read_run, run_info
from experiments.simulated import arrivals_of
from experiments.workloads import Workload
from policies.replica_state import Limits
from policies.shapes import StepShape
from policies.stack import StackSpec
from simulator.costs import FittedCost
from simulator.simulation import Simulation

CUT = (3500, 4000)
ONLINE = ((6, 300), (12, 700), (16, 900))
BATCHES, PROMPT, STEPS = (1, 8, 32, 64, 128), 512, 128
HEADER = ("model", "what", "unit", VLLM, "simulated", "against vLLM", "ours, measured", "against ours", "outside")

Found = dict[str, tuple[float, float]]
"""Key of a metric -> simulated, and the share of steps with a size that the calibration has not measured."""


class Engine:
    """A policy at the step times of a calibration, within its limits."""

    def __init__(self, costs: FittedCost, scheduler: str = "mixed") -> None:
        measured = TypeAdapter(Limits).validate_python(costs.calibration.provenance["limits"])
        self._costs, self._stack = costs, StackSpec(scheduler)
        self._limits = replace(measured, prefix_caching=False, num_host_blocks=0)

    def serve(self, lengths: Sequence[tuple[int, int]], arrivals: Sequence[int] | None = None) -> tuple[Run, float]:
        """The run of these (prompt, output) tokens, all at once or at these nanoseconds; and the share outside."""
        prompts, outputs = zip(*lengths, strict=True)
        workload = Workload.build(arrivals or [0] * len(lengths), prompts, outputs)
        stack, coming = self._stack, arrivals_of(workload, self._limits)
        info = run_info(
            "sim", spec={}, limits=asdict(self._limits), stack=stack.as_dict(), clairvoyant=False, workload={}
        )
        with tempfile.TemporaryDirectory() as scratch:
            with RunWriter(Path(scratch) / "run", info, decisions=False, flush_seconds=None) as writer:
                policies = stack.build(block_size=self._limits.block_size)
                Simulation(self._limits, [policies], self._costs, recorder=writer).run(coming.arrivals)
            run = read_run(Path(scratch) / "run")
            _ = run.requests, run.steps  # while they are there
        ran = run.steps[run.steps["num_samples"] + run.steps["num_chunks"] > 0]
        shapes = (StepShape(*row) for row in ran[list(StepShape._fields)].itertuples(index=False, name=None))
        outside = [not self._costs.inside(shape) for shape in shapes]
        return run, float(np.mean(outside))

    def seconds(self, lengths: Sequence[tuple[int, int]]) -> tuple[float, float]:
        """Until the last of them has ended, all having come at once."""
        run, outside = self.serve(lengths)
        return float(run.requests["finish_ns"].max()) / 1e9, outside


def simulated(costs: FittedCost, lengths: list[tuple[int, int]]) -> Found:
    """Every figure that there is of vLLM, but for starting."""
    offline, steady, found = Engine(costs), Engine(costs, "prefill_first"), Found()
    for batch in BATCHES:
        long, outside = steady.seconds([(PROMPT, STEPS + 1)] * batch)
        short, _ = steady.seconds([(PROMPT, 1)] * batch)
        found[f"decode_ms_b{batch}"] = (1e3 * (long - short) / STEPS, outside)
    for length in (512, 2048):
        took, outside = steady.seconds([(length, 1)])
        found[f"prefill_ms_1x{length}"] = (1e3 * took, outside)
    took, outside = steady.seconds([(2048, 1)] * 32)
    found["prefill_tok_s_32x2048"] = (32 * 2048 / took, outside)
    draw = random.Random(0)
    uniform = [(draw.randint(100, 1024), draw.randint(100, 1024)) for _ in range(256)]
    took, outside = offline.seconds(uniform)
    found["offline256_out_tok_s"] = (sum(output for _, output in uniform) / took, outside)
    took, outside = offline.seconds(lengths[:1000])
    found["azure_out_tok_s"] = (sum(output for _, output in lengths[:1000]) / took, outside)
    found["azure_req_s"] = (1000 / took, outside)
    return found


def simulated_online(costs: FittedCost, lengths: list[tuple[int, int]]) -> Found:
    """Latencies and throughput at each rate."""
    engine, found = Engine(costs), Found()
    for rate, count in ONLINE:
        run, outside = engine.serve(lengths[:count], poisson_ns(rate, count))
        frame = per_request(run)
        for name, column in (("ttft", "ttft_ms"), ("tpot", "tpot_ms"), ("e2e", "e2e_ms")):
            for percent, value in zip(PERCENTILES, np.percentile(frame[column].dropna(), PERCENTILES), strict=True):
                found[f"online{rate}_{name}_p{percent}_ms"] = (float(value), outside)
        span_s = float(run.requests["finish_ns"].max()) / 1e9
        found[f"online{rate}_out_tok_s"] = (float(frame["output_tokens"].sum()) / span_s, outside)
    return found


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The table of every model's figures, in the order of `metrics`."""
    lines = [f"| {' | '.join(HEADER)} |", "| --- | --- | --- |" + " ---: |" * (len(HEADER) - 3)]
    for model, result in results.items():
        lines += [f"| {' | '.join(row)} |" for row in _rows(model, result)]
    return "\n".join(lines) + "\n"


def _rows(model: str, result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    of: Callable[[Metric], Any] = lambda metric: result["simulated"].get(metric.key)  # noqa: E731
    for metric in metrics(model):
        if metric.vllm is None or of(metric) is None:
            continue
        value, outside = of(metric)
        ours = result["measured"].get(metric.key)
        against = "" if ours is None else f"{value / ours - 1:+.0%}"
        numbers = (figure(metric.vllm), figure(value), f"{value / metric.vllm - 1:+.0%}", figure(ours), against)
        yield (model, metric.label, metric.unit, *numbers, f"{outside:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, help="AzureLLMInferenceTrace_conv.csv")
    parser.add_argument("--records", type=Path, default=Path("benchmarks/results"), help="(default: %(default)s)")
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for model in MODELS:
        calibrations = sorted((options.records / "fidelity" / model / "calibrations").glob("*.json"))
        if not calibrations:
            sys.exit(f"across_engines: no calibration in {options.records}/fidelity/{model}; name another --records")
        costs = FittedCost.load(calibrations[0])
        lengths, _ = read_lengths(options.trace, *CUT)
        found = simulated(costs, lengths)
        if any(metric.key.startswith("online") for metric in metrics(model)):
            found |= simulated_online(costs, lengths)
        measured = json.loads((options.records / f"gpu-serving-{model}.json").read_text())["metrics"]
        results[model] = {"simulated": found, "measured": {key: measured[key] for key in found if key in measured}}
    path = out_folder() / "across-engines.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
