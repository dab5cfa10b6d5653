"""The demonstration: one machine, one small model, two policies, both panels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from experiments.at_once import throughput_at_once
from experiments.compare import Comparison, compare
from experiments.divergence import Divergence, diff_decisions
from experiments.real import load, real_limits, run_real
from experiments.records import read_run
from experiments.repeats import noise_floor
from experiments.replaying import replay_run
from experiments.simulated import run_simulated
from experiments.spec import CostSpec, RunSpec, check_spec
from experiments.workloads import Workload, make_workload
from runtime.engine import Engine
from runtime.sampling.params import SamplingParams
from runtime.sequence import Output
from runtime.weights import LoadedModel
from simulator.costs.fitted import FittedCost

POLICIES = ("static", "mixed")
LOAD = 0.7
"""Of the capacity that the simulator finds for the second policy: loaded, and not overloaded."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy in both panels."""

    policy: str
    comparison: Comparison
    replayed_steps: int
    divergence: Divergence | None
    noise: dict[str, float] = field(default_factory=dict)
    """How far the same run, served once more, was from the first time, by metric; empty where it was not."""


def demo_spec(source: str, load_format: str, policy: str = POLICIES[1]) -> RunSpec:
    """Azure's chat lengths at a tenth, so that two cores can serve them, and the limits of a small replica."""
    return check_spec(
        {
            "workload": {"name": "chat", "n": 60, "rate": 1.0, "length_scale": 0.1, "max_input": 400, "seed": 1},
            "policies": {"scheduler": "static,max_batch_size=8" if policy == "static" else policy},
            "model": {"source": source, "load_format": load_format},
            "limits": {
                "num_blocks": 512,
                "max_num_seqs": 8,
                "max_num_batched_tokens": 128,
                "max_model_len": 1024,
                "lag": 0,
            },
        }
    )


class Demo:
    """The demonstration's steps, in order: `load`, `ask`, `make_workload`, `serve_and_simulate` for each policy."""

    def __init__(self, folder: Path, source: str, load_format: str) -> None:
        self.folder = folder
        self.source, self.load_format = source, load_format
        self.spec = demo_spec(source, load_format)

    def load(self) -> LoadedModel:
        """Get the model, from the cache where it has been fetched before."""
        return load(self.spec.model)

    def ask(self, loaded: LoadedModel, question: str) -> str:
        """The model's answer to a question, by the engine; nothing where it has no tokenizer or no chat template."""
        if loaded.tokenizer is None or loaded.chat_template is None:
            return ""
        prompt = loaded.tokenizer.apply_chat_template([{"role": "user", "content": question}])
        limits = real_limits(self.spec, loaded)
        params = SamplingParams(temperature=0, max_tokens=48)
        with Engine(loaded, limits, self.spec.policies.stack.build(block_size=limits.block_size)) as engine:
            ((completion,),) = engine.generate([loaded.tokenizer.encode(prompt, add_special_tokens=False)], params)
            engine.raise_if_dead()
        return completion.text.strip()

    def make_workload(self, loaded: LoadedModel, costs: FittedCost, seconds: float) -> Workload:
        """Requests for about `seconds`, at a rate that the simulator says this machine can bear.

        `costs` is what calibration.json in the folder holds.
        """
        limits = real_limits(self.spec, loaded)
        workload = make_workload(self.spec.workload)
        capacity = throughput_at_once(self.spec, workload, costs=costs, limits=limits)
        rate = LOAD * capacity
        count = max(10, min(400, round(rate * seconds)))
        specification = self.spec.workload.model_copy(update={"rate": rate, "n": count, "arrivals": "poisson"})
        cost = CostSpec(kind="fitted", calibration=str(self.folder / "calibration.json"))
        self.spec = self.spec.model_copy(update={"workload": specification, "cost": cost})
        return make_workload(specification)

    def serve_and_simulate(
        self,
        policy: str,
        loaded: LoadedModel,
        workload: Workload,
        costs: FittedCost,
        on_output: Callable[[Output], None],
        again: bool = False,
    ) -> Outcome:
        """Serve the workload, simulate it, replay the decisions, compare. `again`: serve it a second time, which says
        how steady the machine is."""
        policies = demo_spec(self.source, self.load_format, policy).policies
        spec = self.spec.model_copy(update={"policies": policies})
        real, simulated, replayed = (self.folder / f"{policy}-{panel}" for panel in ("real", "sim", "replay"))
        noise = {}
        run_real(spec, real, workload=workload, loaded=loaded, overwrite=True, on_output=on_output)
        if again:
            repeat = self.folder / f"{policy}-real-again"
            run_real(spec, repeat, workload=workload, loaded=loaded, overwrite=True, on_output=on_output)
            noise = noise_floor(read_run(real), [read_run(repeat)])
        limits = real_limits(spec, loaded)
        run_simulated(spec, simulated, workload=workload, costs=costs, limits=limits, overwrite=True)
        replay_run(read_run(real), replayed, overwrite=True)
        return Outcome(
            policy,
            compare(read_run(real), read_run(simulated)),
            len(read_run(real).steps),
            diff_decisions(read_run(real), read_run(replayed)),
            noise,
        )
