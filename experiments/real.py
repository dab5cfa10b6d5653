"""Running a specification in the real panel: load the model, send the workload at its times, record what happens."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from experiments.records import RunWriter, read_run, run_info
from experiments.simulated import GIB, LIMITS, make_costs, oracle_entry, request_details
from experiments.spec import ModelSpec, RunSpec, SpecError
from experiments.timeline import check_books
from experiments.workloads import Workload, make_workload, prompt_token_ids
from policies.replica_state import Limits
from runtime.engine import Details, Engine
from runtime.kv_cache import bytes_per_block, num_blocks_that_fit
from runtime.sampling.params import SamplingParams
from runtime.sequence import Output
from runtime.weights import LoadedModel, load_model
from simulator.costs.base import CostModel

WARM_UP_TOKENS = 8


def load(spec: ModelSpec) -> LoadedModel:
    """The model of a specification, on its device. Raises SpecError or ModelError."""
    if spec.device.startswith("cuda") and not torch.cuda.is_available():
        raise SpecError(f"model.device: {spec.device} was asked for, and PyTorch sees no CUDA device; use cpu")
    return load_model(
        spec.source, load_format=spec.load_format, dtype=getattr(torch, spec.dtype), device=torch.device(spec.device)
    )


def check_servable(spec: RunSpec) -> None:
    """Raises SpecError for what only the simulated panel can do."""
    if spec.replicas > 1:
        raise SpecError(
            f"replicas: the runtime serves one replica, not {spec.replicas}; simulate several with diptych simulate"
        )


def real_limits(spec: RunSpec, loaded: LoadedModel) -> Limits:
    """The limits of the replica: as given, the KV cache sized by the memory that is free.

    Raises SpecError for a KV cache that the machine's memory cannot hold.
    """
    given = spec.limits
    num_blocks = given.num_blocks
    if num_blocks is None:
        memory = GIB * given.kv_cache_gib if given.kv_cache_gib is not None else _free_memory(loaded)
        num_blocks = num_blocks_that_fit(int(memory), loaded.config, given.block_size, loaded.model.dtype)
        if num_blocks < 1:
            raise SpecError(f"{memory / GIB:.2f} GiB hold no KV block of {loaded.name}; give limits.kv_cache_gib")
    needed = (num_blocks + 1) * bytes_per_block(loaded.config, given.block_size, loaded.model.dtype)
    there = _memory_there(loaded)
    if needed > there:
        raise SpecError(
            f"a KV cache of {num_blocks} blocks needs {needed / GIB:,.1f} GiB, and {loaded.model.device} has "
            f"{there / GIB:,.1f} GiB; lower limits.num_blocks or limits.kv_cache_gib"
        )
    fields = {name: getattr(given, name) for name in LIMITS}
    fields["num_blocks"] = num_blocks
    fields["max_model_len"] = given.max_model_len or min(8192, loaded.config.max_model_len)
    return Limits(**fields)


def _memory_there(loaded: LoadedModel) -> int:
    """Bytes: of a GPU what is free, of this machine all it has, as the system makes room."""
    device = loaded.model.device
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, for reuse
        return torch.cuda.mem_get_info(device)[0] + kept
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_memory(loaded: LoadedModel) -> float:
    if loaded.model.device.type != "cuda":
        return 1.0 * GIB
    total = torch.cuda.mem_get_info(loaded.model.device)[1]
    return max(0.0, _memory_there(loaded) - 0.1 * total)  # the tenth is for activations


def run_real(
    spec: RunSpec,
    folder: Path,
    *,
    workload: Workload | None = None,
    loaded: LoadedModel | None = None,
    cost: CostModel | None = None,
    overwrite: bool = False,
    check: bool = False,
    on_output: Callable[[Output], None] | None = None,
) -> None:
    """Serve a specification's workload and write its run folder.

    `workload` and `loaded` may be given where they are at hand already. Interrupted, the engine stops after the step in
    flight and the record stays readable, with what was unfinished marked so. `check`: invariants after every step,
    Little's law at the end.
    """
    check_servable(spec)
    workload = workload or make_workload(spec.workload)
    loaded = loaded or load(spec.model)
    if cost is None and spec.cost is not None:
        cost = make_costs(spec.cost)
    limits = real_limits(spec, loaded)
    oracle = dict(enumerate(workload.output_tokens.tolist()))
    build = spec.policies.stack.build
    stack = build(block_size=limits.block_size, seed=spec.seed, oracle=oracle)
    encode = None if loaded.tokenizer is None else loaded.tokenizer.encode
    prompts = prompt_token_ids(workload, encode, loaded.config.vocab_size, spec.seed)
    warm_up(loaded, limits, spec, cost)
    info = run_info(
        "real",
        spec=spec.model_dump(mode="json"),
        limits=asdict(limits),
        stack=spec.policies.stack.as_dict(),
        clairvoyant=stack.clairvoyant,
        **oracle_entry(oracle, stack.clairvoyant),
        workload=workload.provenance,
        model=loaded.name,
        **({} if cost is None else {"cost": cost.describe()}),
    )
    with (
        RunWriter(folder, info, overwrite=overwrite, decisions=spec.decisions) as writer,
        Engine(
            loaded,
            limits,
            stack,
            recorder=writer,
            cost=cost,
            attention=spec.model.attention,
            seed=spec.seed,
            check=check,
        ) as engine,
    ):
        _send(engine, spec, workload, prompts, on_output or (lambda output: None))
    if check:
        check_books(read_run(folder))


def warm_up(loaded: LoadedModel, limits: Limits, spec: RunSpec, cost: CostModel | None = None) -> None:
    """Run a few steps of each kind, so that no request of the run pays for first-time work."""
    stack = spec.policies.stack.build(block_size=limits.block_size, oracle=dict.fromkeys(range(4), WARM_UP_TOKENS))
    length = min(64, limits.max_model_len - WARM_UP_TOKENS, limits.num_blocks * limits.block_size // 8)
    with Engine(loaded, limits, stack, cost=cost, attention=spec.model.attention) as engine:
        prompts = [[1 + i] * max(1, length) for i in range(4)]
        params = SamplingParams(temperature=0, max_tokens=WARM_UP_TOKENS, ignore_eos=True)
        engine.generate(prompts, params)
        engine.raise_if_dead()


def _send(
    engine: Engine, spec: RunSpec, workload: Workload, prompts: list[list[int]], on_output: Callable[[Output], None]
) -> None:
    """Hand in each request at its time, counted from now, and wait for the last one to end."""
    ended = threading.Semaphore(0)

    def listen(output: Output) -> None:
        on_output(output)
        if output.finish_reason is not None:
            ended.release()

    start = time.monotonic()
    for i, arrival_ns in enumerate(workload.arrival_ns.tolist()):
        delay = start + arrival_ns / 1e9 - time.monotonic()
        if delay > 0:
            time.sleep(delay)
        engine.submit(prompts[i], _params(spec, workload, i), listen, _details(spec, workload, i))
    for _ in range(len(workload)):
        ended.acquire()
    engine.raise_if_dead()


def _params(spec: RunSpec, workload: Workload, i: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=int(workload.max_tokens[i]), ignore_eos=spec.forced_lengths)


def _details(spec: RunSpec, workload: Workload, i: int) -> Details:
    known = request_details(workload, i)
    forced = int(workload.output_tokens[i]) if spec.forced_lengths else None
    return Details(known.tenant, known.session, priority=known.priority, hints=known.hints, forced_length=forced)
