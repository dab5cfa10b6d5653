"""Measuring a runtime's step times and fitting a cost model to them: `diptych profile`.

The steps measured are the engine's own. First come the rounds of `experiments.profile_design`, under a scheduler whose
token budget differs from step to step, so that chunks of all sizes begin at all positions; then one trace under one
policy, as a server meets it: requests of the `chat` workload, kept at a few levels of concurrency. With a host tier,
now and then a request that decodes is swapped out, and comes back in the next step. Before all that, prompts are looked
up in a prefix cache, on an engine of its own: everywhere else each is to be computed.

What a run's host does beside its steps is done here too, for the device waits for it now and then: all is recorded to
disk, and the trace's prompts are in memory from the beginning, each with tokens of its own.
"""

from __future__ import annotations

import itertools
import queue
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.profile_design import Design, Round
from experiments.real import Prepared, load, prepare, start_engine, start_runner
from experiments.records import RunWriter, describe_environment, run_info, write_compact
from experiments.records.environment import gpu_state
from experiments.records.schema import to_table
from experiments.refitting import DESIGN_SHARE
from experiments.spec import ModelSpec, RunSpec
from experiments.workloads import WorkloadSpec, make_workload, prompt_token_ids
from policies.collecting import few_collections
from policies.contract import Queue, Recorder, View
from policies.plan import Mode, Plan
from policies.queues.fcfs import Fcfs
from policies.records import STEPS
from policies.replica_state import Limits
from policies.schedulers.mixed import Mixed
from policies.stack import StackSpec
from runtime.engine import Details, Engine
from runtime.model_runner import ModelRunner
from runtime.sampling.params import SamplingParams
from runtime.sequence import Output
from runtime.weights import LoadedModel
from simulator.costs.fitted import FittedCost
from simulator.costs.fitting import fit
from simulator.costs.samples import samples_from_steps

CONCURRENCY = ((1 / 64, 1), (1 / 16, 1), (1 / 8, 1), (1 / 4, 1), (1 / 2, 2), (1, 3))
"""Requests of the trace that are kept in flight, as a share of `max_num_seqs`; and for how long, relatively: many take
longer until old and young ones are mixed as in the long run."""
TRACE_REQUESTS = 1000
LOOKUP_SHARE = 0.1
"""Of the time, for prefix caching."""


@dataclass
class KeptSteps:
    """Keeps the steps' rows, and hands all on to another recorder."""

    other: Recorder
    rows: list[tuple[object, ...]] = field(default_factory=list)

    def request(self, row: tuple[object, ...]) -> None:
        self.other.request(row)

    def step(self, row: tuple[object, ...]) -> None:
        self.rows.append(row)
        self.other.step(row)

    def decision(self, row: tuple[object, ...]) -> None:
        self.other.decision(row)


class ProfileScheduler(Mixed):
    """`mixed`, but a step with others beside the prompt that it begins may have a smaller token budget; and with
    `swaps`, every so many steps in which requests only decode, one of them is swapped out.

    `vary`: whether budgets differ: one step in two has the whole one, the others log-uniform ones.
    """

    EVERY = 6
    LEAST = 32

    def __init__(self, queue: Queue, seed: int, *, swaps: bool) -> None:
        super().__init__(queue)
        self.vary = True
        self._swaps = swaps
        self._random = np.random.default_rng(seed)
        self._num_plans = 0

    def plan(self, view: View, now: int) -> Plan:
        self._num_plans += 1
        if view.prefilling or view.num_waiting:
            others = view.prefilling or view.num_decoding
            return self._within_budget(view, now) if self.vary and others else super().plan(view, now)
        if not self._swaps or self._num_plans % self.EVERY or view.swapped or view.num_decoding < 2:
            return super().plan(view, now)
        return self._swap_one(view, now)

    def _within_budget(self, view: View, now: int) -> Plan:
        """Decodes, and chunks as far as the budget goes."""
        whole = view.max_num_batched_tokens
        budget = whole
        if self._random.random() < 0.5 and whole > self.LEAST:
            budget = int(np.exp(self._random.uniform(np.log(self.LEAST), np.log(whole))))
        draft = self.start(view, now)
        draft.run_decodes(now)
        # Of decodes alone there is no harm in one more token: somebody has to go on.
        draft.tokens_left = min(draft.tokens_left, max(1, budget - draft.num_tokens))
        for request in list(view.prefilling.values()):
            tokens = min(request.num_pending_tokens, draft.tokens_left)
            if tokens > 0 and request.id not in draft.preempted:
                draft.run_or_preempt(request, tokens, now)
        if not draft.preempted:
            self.admit_from_queue(draft, now)
        return draft.finish()

    def _swap_one(self, view: View, now: int) -> Plan:
        draft = self.start(view, now)
        running = [r for r in view.running.values() if r.num_output_tokens < r.max_tokens and draft.can_swap(r)]
        if running:
            draft.preempt(running[self._num_plans // self.EVERY % len(running)], Mode.SWAP)
        draft.run_decodes(now)
        return draft.finish()


@few_collections()
def profile(
    spec: RunSpec,
    seconds: float,
    *,
    loaded: LoadedModel | None = None,
    prepared: Prepared | None = None,
    runner: ModelRunner | None = None,
    on_progress: Callable[[float], None] | None = None,
    on_start: Callable[[dict[str, float]], None] | None = None,
    steps_to: Path | None = None,
) -> FittedCost:
    """Measure the runtime of a specification (model, device, limits) for about `seconds` and fit its cost model.

    `on_progress` gets the share of the time that has passed, `on_start` before that what the parts of the start took.
    `prepared` and `runner` may be given where they are at hand already. `steps_to`: a Parquet file for the steps that
    were measured. The result's provenance has the device, its clocks, the software, the model and the limits; its
    held-out error is in its description.
    """
    with ExitStack() as opened:
        if loaded is None:
            loaded = opened.enter_context(closing(load(spec.model)))
        prepared = prepared or prepare(spec, loaded)
        # Prompts repeat here, and each is to be computed; and a host that waits would look like a busy one.
        uncached = replace(prepared.limits, prefix_caching=False, plan_lead_ns=None, num_disk_blocks=0)
        if runner is None:
            runner = opened.enter_context(closing(start_runner(loaded, uncached, prepared.spec.model)))
        if on_start is not None:
            on_start({**prepared.seconds, **runner.startup_seconds})
        return _measured(prepared, uncached, seconds, loaded, runner, on_progress or (lambda share: None), steps_to)


def _measured(
    prepared: Prepared,
    uncached: Limits,
    seconds: float,
    loaded: LoadedModel,
    runner: ModelRunner,
    progress: Callable[[float], None],
    steps_to: Path | None,
) -> FittedCost:
    """What is fitted to the steps of this runner: a tenth of the time with prefix caching, the rest without."""
    spec, limits, before, started = prepared.spec, prepared.limits, gpu_state(), time.monotonic_ns()
    part, left = LOOKUP_SHARE, 1 - LOOKUP_SHARE
    looked_up = _lookups(spec, uncached, part * seconds, loaded, runner, lambda share: progress(part * share))
    stack = StackSpec().build(block_size=uncached.block_size)
    scheduler = ProfileScheduler(Fcfs(), spec.seed, swaps=limits.num_host_blocks > 0)
    stack.scheduler = scheduler
    requests = _trace(uncached, loaded.config.vocab_size, spec.seed)
    about = _about(spec, uncached)
    with tempfile.TemporaryDirectory() as scratch, RunWriter(Path(scratch) / "profile", about) as writer:
        recorder = KeptSteps(writer)
        with start_engine(loaded, uncached, stack, spec.model, recorder=recorder, runner=runner) as engine:
            later = time.monotonic_ns() - engine.now() - started
            stream = _Stream(engine, left * seconds, lambda share: progress(part + left * share))
            stream.rounds(Design(uncached, spec.seed).rounds(), DESIGN_SHARE)
            scheduler.vary = False
            serving_from_ns = engine.now() + later
            levels = [(max(1, round(share * uncached.max_num_seqs)), time) for share, time in CONCURRENCY]
            stream.trace(itertools.cycle(requests), levels)
            after = gpu_state()
    rows = [*looked_up, *(_moved(row, later) for row in recorder.rows)]
    if steps_to is not None:
        _save_steps(rows, steps_to)
    steps = pd.DataFrame(rows, columns=list(STEPS))
    provenance = {
        **describe_environment("real"),
        "gpu_before": before,
        "gpu_after": after,
        **_model(spec.model, loaded),
        "limits": {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(limits).items()},
        "seconds": seconds,
        "seed": spec.seed,
        "num_steps": len(steps),
        "serving_from_ns": serving_from_ns,
    }
    samples = samples_from_steps({name: steps[name].to_numpy() for name in STEPS}, serving_from_ns)
    return fit(samples, provenance)


def _lookups(
    spec: RunSpec,
    uncached: Limits,
    seconds: float,
    loaded: LoadedModel,
    runner: ModelRunner,
    on_progress: Callable[[float], None],
) -> list[tuple[object, ...]]:
    """Rows of the steps of an engine that caches prefixes, as if of another replica."""
    limits = replace(uncached, prefix_caching=True, num_host_blocks=0)
    stack = StackSpec().build(block_size=limits.block_size)
    with tempfile.TemporaryDirectory() as scratch, RunWriter(Path(scratch) / "profile", _about(spec, limits)) as writer:
        recorder = KeptSteps(writer)
        with start_engine(loaded, limits, stack, spec.model, recorder=recorder, runner=runner) as engine:
            _Stream(engine, seconds, on_progress).rounds(Design(limits, spec.seed).lookups(), 1)
    return [(1, *row[1:]) for row in recorder.rows]


def _moved(row: tuple[object, ...], later: int) -> tuple[object, ...]:
    """A row of a step whose replica began so much later."""
    return tuple(
        value + later if name in _TIMES and isinstance(value, int) else value
        for name, value in zip(STEPS, row, strict=True)
    )


_TIMES = ("plan_ns", "launch_ns", "end_ns", "wake_ns")


class _Stream:
    """Keeps an engine busy until the time is up."""

    def __init__(self, engine: Engine, seconds: float, on_progress: Callable[[float], None]) -> None:
        self._engine = engine
        self._seconds = seconds
        self._on_progress = on_progress
        self._started = time.monotonic()
        self._vocab = engine.loaded.config.vocab_size
        self._tokens = [(7 * i) % self._vocab for i in range(engine.limits.max_model_len)]
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._running: set[int] = set()

    def rounds(self, rounds: Iterator[Round], share: float) -> None:
        """At least one round."""
        overlap = 0
        for one in rounds:
            self._wait_for(overlap)
            texts = one.texts or (0,) * len(one.requests)
            for (prompt, output), text in zip(one.requests, texts, strict=True):
                self._submit([text % self._vocab, *self._tokens[1:prompt]], output)
            overlap = one.overlap
            if self._passed() >= share:
                break
        self._wait_for(0)

    def trace(self, requests: Iterator[tuple[list[int], int]], levels: Sequence[tuple[int, int]]) -> None:
        """So many in flight, each level for its share of what is left of the time."""
        left, total = 1 - self._passed(), sum(weight for _, weight in levels)
        until = 1 - left
        for level, weight in levels:
            until += left * weight / total
            while self._passed() < until:
                while len(self._running) < level:
                    self._submit(*next(requests))
                self._wait_for(level - 1)
        for request_id in self._running:
            self._engine.cancel(request_id)
        self._wait_for(0)

    def _passed(self) -> float:
        share = (time.monotonic() - self._started) / self._seconds
        self._on_progress(min(1.0, share))
        return share

    def _submit(self, prompt: list[int], output: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        details = Details(forced_length=output)
        self._running.add(self._engine.submit(prompt, params, self._listen, details))

    def _listen(self, output: Output) -> None:
        if output.finish_reason is not None:
            self._ended.put(output.request_id)

    def _wait_for(self, running: int) -> None:
        """Until no more than so many run."""
        while len(self._running) > max(0, running):
            self._running.discard(self._ended.get())
        self._engine.raise_if_dead()


def _trace(limits: Limits, vocab_size: int, seed: int) -> list[tuple[list[int], int]]:
    """(prompt, output tokens) of the `chat` workload, cut to what a replica can hold."""
    longest = max(2, min(limits.max_model_len, limits.num_blocks * limits.block_size // 2))
    workload = make_workload(WorkloadSpec(name="chat", n=TRACE_REQUESTS, seed=seed, max_model_len=longest))
    prompts = prompt_token_ids(workload, None, vocab_size, seed)
    return list(zip(prompts, workload.output_tokens.tolist(), strict=True))


def _about(spec: RunSpec, limits: Limits) -> dict[str, Any]:
    """Of a record that nobody reads."""
    stack = StackSpec().as_dict()
    return run_info(
        "real", spec=spec.model_dump(mode="json"), limits=asdict(limits), stack=stack, clairvoyant=False, workload={}
    )


def _model(spec: ModelSpec, loaded: LoadedModel) -> dict[str, Any]:
    """What is to be known of it."""
    sizes = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    return {
        "model": loaded.name,
        "shape": {name: int(getattr(loaded.config, name)) for name in (*sizes, "num_experts")},
        "dtype": spec.dtype,
        "quantization": spec.quantization,
        "kv_cache_dtype": spec.kv_cache_dtype,
        "tensor_parallel": spec.tensor_parallel,
        "attention": spec.attention,
    }


def _save_steps(rows: Sequence[tuple[object, ...]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_compact(to_table("steps", rows), path)
