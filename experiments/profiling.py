"""Measuring a runtime's step times and fitting a cost model to them: `diptych profile`.

The steps measured are the engine's own, under its own scheduler, from three kinds of rounds: bursts of requests whose
outputs end one after another (decode batches of every size, at many contexts), single prompts (prefill chunks), and
bursts of prompts longer than the token budget (mixed steps). With a host tier, now and then a request that decodes is
swapped out, and comes back in the next step. Rounds are drawn from a seeded design and repeated until
the time is up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pandas as pd

from experiments.real import load, real_limits, resolved, start_engine, warm_up
from experiments.records import describe_environment
from experiments.spec import RunSpec
from policies.contract import Queue, View
from policies.plan import Mode, Plan
from policies.queues.fcfs import Fcfs
from policies.records import STEPS
from policies.replica_state import Limits
from policies.schedulers.mixed import Mixed
from policies.stack import StackSpec
from runtime.engine import Details
from runtime.sampling.params import SamplingParams
from runtime.startup import timed
from runtime.weights import LoadedModel
from simulator.costs.fitted import FittedCost
from simulator.costs.fitting import fit
from simulator.costs.samples import samples_from_steps

Round = list[tuple[int, int]]
"""(prompt tokens, output tokens) of requests that are submitted together."""


@dataclass
class StepRows:
    """A recorder that keeps the steps' rows and drops the rest."""

    rows: list[tuple[object, ...]] = field(default_factory=list)

    def request(self, row: tuple[object, ...]) -> None:
        """Not needed for a fit."""

    def step(self, row: tuple[object, ...]) -> None:
        self.rows.append(row)

    def decision(self, row: tuple[object, ...]) -> None:
        """Not needed for a fit."""


class SwapNowAndThen(Mixed):
    """`mixed`, but every so many steps in which requests only decode, one of them is swapped out."""

    EVERY = 6

    def __init__(self, queue: Queue) -> None:
        super().__init__(queue)
        self._num_plans = 0

    def plan(self, view: View, now: int) -> Plan:
        self._num_plans += 1
        if self._num_plans % self.EVERY or view.swapped or view.prefilling or view.num_waiting or view.num_decoding < 2:
            return super().plan(view, now)
        draft = self.start(view, now)
        running = [r for r in view.running.values() if r.num_output_tokens < r.max_tokens and draft.can_swap(r)]
        if running:
            draft.preempt(running[self._num_plans // self.EVERY % len(running)], Mode.SWAP)
        draft.run_decodes(now)
        return draft.finish()


def profile(
    spec: RunSpec,
    seconds: float,
    *,
    loaded: LoadedModel | None = None,
    on_progress: Callable[[float], None] | None = None,
    on_start: Callable[[dict[str, float]], None] | None = None,
) -> FittedCost:
    """Measure the runtime of a specification (model, device, limits) for about `seconds` and fit its cost model.

    `on_progress` gets the share of the time that has passed, `on_start` before that what the parts of the start took.
    The result's provenance has the device, the software, the
    model and the limits; its held-out error is in its description.
    """
    if loaded is None:
        with closing(load(spec.model)) as loaded:
            return profile(spec, seconds, loaded=loaded, on_progress=on_progress, on_start=on_start)
    parts = {"load": loaded.load_seconds}
    spec = resolved(spec, loaded)
    with timed(parts, "memory_profile"):
        limits = real_limits(spec, loaded)
    # Prompts repeat here, and each is to be computed; and a host that waits would look like a busy one.
    uncached = replace(limits, prefix_caching=False, plan_lead_ns=None)
    with timed(parts, "warm_up"):
        warm_up(loaded, uncached, spec)
    recorder = StepRows()
    stack = StackSpec().build(block_size=limits.block_size)
    if limits.num_host_blocks:
        stack.scheduler = SwapNowAndThen(Fcfs())
    with start_engine(loaded, uncached, stack, spec.model, recorder=recorder) as engine:
        if on_start is not None:
            on_start({**parts, **engine.startup_seconds})
        started = time.monotonic()
        for requests in _design(uncached, spec.seed):
            engine.generate(
                [_prompt(length, loaded.config.vocab_size) for length, _ in requests],
                [SamplingParams(temperature=0, max_tokens=output, ignore_eos=True) for _, output in requests],
                [Details(forced_length=output) for _, output in requests],
            )
            engine.raise_if_dead()
            passed = (time.monotonic() - started) / seconds
            if on_progress is not None:
                on_progress(min(1.0, passed))
            if passed >= 1:
                break
    steps = pd.DataFrame(recorder.rows, columns=list(STEPS))
    provenance = {
        **describe_environment("real"),
        "model": loaded.name,
        "dtype": spec.model.dtype,
        "quantization": spec.model.quantization,
        "kv_cache_dtype": spec.model.kv_cache_dtype,
        "tensor_parallel": spec.model.tensor_parallel,
        "limits": {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(limits).items()},
        "seconds": seconds,
        "seed": spec.seed,
        "num_steps": len(steps),
    }
    return fit(samples_from_steps({name: steps[name].to_numpy() for name in STEPS}), provenance)


def _prompt(length: int, vocab_size: int) -> Sequence[int]:
    return [(7 * i) % vocab_size for i in range(length)]


def _design(limits: Limits, seed: int) -> Iterator[Round]:
    """Endless rounds; each third one is of the next kind, its sizes drawn log-uniformly within the limits."""
    random = np.random.default_rng(seed)
    longest = min(limits.max_model_len - 1, limits.num_blocks * limits.block_size // 2)

    def size(largest: float) -> int:
        return int(np.exp(random.uniform(0, np.log(max(1.0, largest)))))

    while True:
        batch = min(size(limits.max_num_seqs * 1.5), limits.max_num_seqs)
        context = max(1, min(longest // 2, limits.num_blocks * limits.block_size // (2 * batch)))
        room = max(1, min(longest // 2, 3 * batch))
        yield [(size(context), max(1, (i + 1) * room // batch)) for i in range(batch)]
        yield [(size(longest), 1)]
        batch = min(size(limits.max_num_seqs), 6)
        share = max(2, min(longest // 2, 2 * limits.max_num_batched_tokens // batch))
        yield [(size(share), 2 + size(min(24, share))) for _ in range(batch)]
