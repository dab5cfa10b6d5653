"""Running a specification in the real panel: load the model, send the workload at its times, record what happens."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from experiments.records import RunWriter, read_run, run_info
from experiments.sending import send
from experiments.simulated import (
    GIB,
    LIMITS,
    check_disk,
    check_offload,
    check_swaps,
    clients_entry,
    make_costs,
    oracle_entry,
    oracle_of,
    patience_of,
)
from experiments.spec import LimitsSpec, ModelSpec, RunSpec, SpecError
from experiments.timeline import check_books
from experiments.workloads import Workload, make_workload, prompt_token_ids
from policies.collecting import few_collections
from policies.contract import Recorder
from policies.control_plane import ControlPlane
from policies.replica_state import Limits
from policies.shapes import default_capture_sizes, default_mixed_capture_sizes
from policies.stack import PolicyStack, StackSpec
from runtime.attention import AttentionShape, get_backend
from runtime.disk import block_times
from runtime.engine import GPU_PLAN_LEAD_NS, Engine, EngineDead
from runtime.kv_cache import bytes_per_block, num_blocks_that_fit
from runtime.memory import free_bytes, profile_num_blocks
from runtime.model_config import ModelError
from runtime.model_runner import ModelRunner
from runtime.parallel.leader import Leader
from runtime.parallel.ranks import Ranks
from runtime.sampling.params import SamplingParams
from runtime.sequence import Output
from runtime.startup import timed
from runtime.weights import LoadedModel, load_model
from simulator.costs.base import CostModel

WARM_UP_TOKENS = 8
HOST_SHARE = 0.9
"""Of this machine's memory, for swapped KV blocks: pinned memory cannot be taken back by the system."""
GPU_MEMORY_SHARE = 0.95
"""Of a GPU's memory, for weights, the largest step and the KV cache, where nobody says."""


def load(spec: ModelSpec) -> LoadedModel:
    """The model of a specification, on its device or devices; `close` it. Raises SpecError or ModelError."""
    if spec.device.startswith("cuda") and not torch.cuda.is_available():
        raise SpecError(f"model.device: {spec.device} was asked for, and PyTorch sees no CUDA device; use cpu")
    start = time.perf_counter()
    ranks = Ranks() if spec.tensor_parallel == 1 else Leader(spec.tensor_parallel, spec.device)
    try:
        with explained("loading the model"):
            loaded = load_model(
                spec.source,
                load_format=spec.load_format,
                dtype=getattr(torch, spec.dtype),
                device=torch.device(spec.device),
                quantization=spec.quantization,
                ranks=ranks,
            )
    except BaseException:
        ranks.close()
        raise
    return replace(loaded, load_seconds=time.perf_counter() - start)


def kv_dtype(spec: ModelSpec) -> torch.dtype | None:
    """Type of the KV cache; None: the model's own."""
    return torch.float8_e4m3fn if spec.kv_cache_dtype == "fp8" else None


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Answer a device that is out of memory with a SpecError of one line, which says what to lower."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, EngineDead) as error:
        cause = error.__cause__ if isinstance(error, EngineDead) else error
        if not isinstance(cause, torch.cuda.OutOfMemoryError):
            raise
        reason = str(cause).strip().partition("\n")[0].partition(" GPU ")[0]  # and not who holds the rest
        raise SpecError(
            f"out of memory while {doing}: lower limits.max_num_batched_tokens, limits.kv_cache_gib or "
            "limits.num_blocks, give fewer limits.capture_sizes, or take a smaller model.dtype or "
            f"model.quantization=fp8 ({reason})"
        ) from None


def check_servable(spec: RunSpec) -> None:
    """Raises SpecError for what only the simulated panel can do."""
    spec.check_for_real()
    if spec.replicas > 1:
        raise SpecError(
            f"replicas: the runtime serves one replica, not {spec.replicas}; simulate several with diptych simulate"
        )


def real_limits(spec: RunSpec, loaded: LoadedModel) -> Limits:
    """The limits of the replica: as given, the KV cache sized by what memory the largest step leaves.

    Raises SpecError for a KV cache that the machine's memory cannot hold, and for graphs that nothing would capture;
    ModelError where the model and the largest step leave no memory for a cache.
    """
    spec = resolved(spec, loaded)
    given = spec.limits
    dtype = kv_dtype(spec.model) or loaded.model.dtype
    max_model_len = given.max_model_len or min(8192, loaded.config.max_model_len)
    ladders = _capture_ladders(spec, loaded)
    num_blocks = given.num_blocks
    if num_blocks is None and given.kv_cache_gib is None and loaded.model.device.type == "cuda":
        with explained("measuring the largest step"):
            num_blocks = profile_num_blocks(
                loaded,
                block_size=given.block_size,
                max_num_batched_tokens=given.max_num_batched_tokens,
                max_num_seqs=given.max_num_seqs,
                max_model_len=max_model_len,
                attention=spec.model.attention,
                kv_dtype=dtype,
                memory_share=given.memory_share or GPU_MEMORY_SHARE,
            )
    elif num_blocks is None:
        memory = int(GIB * (given.kv_cache_gib or 1.0))
        num_blocks = num_blocks_that_fit(memory, loaded.config, given.block_size, dtype)
        if num_blocks < 1:
            raise SpecError(f"{memory / GIB:.2f} GiB hold no KV block of {loaded.name}; give limits.kv_cache_gib")
    needed = (num_blocks + 1) * bytes_per_block(loaded.config, given.block_size, dtype)
    needed *= 1 if loaded.model.device.type == "cuda" else loaded.ranks.size
    there = _memory_there(loaded)
    if needed > there:
        raise SpecError(
            f"a KV cache of {num_blocks} blocks needs {needed / GIB:,.1f} GiB, and {loaded.model.device} has "
            f"{there / GIB:,.1f} GiB; lower limits.num_blocks or limits.kv_cache_gib"
        )
    num_host_blocks = _host_blocks(given, loaded, bytes_per_block(loaded.config, given.block_size, dtype))
    disk = _disk(given, loaded, bytes_per_block(loaded.config, given.block_size, dtype))
    check_disk(int(disk.get("num_disk_blocks", 0)), num_host_blocks, given.prefix_caching)
    fields = {name: getattr(given, name) for name in LIMITS}
    lead = given.plan_lead_ns
    if lead is None and loaded.model.device.type == "cuda":
        lead = GPU_PLAN_LEAD_NS
    return Limits(
        **{**fields, "num_blocks": num_blocks, "max_model_len": max_model_len, "plan_lead_ns": lead, **ladders},
        num_host_blocks=num_host_blocks,
        **disk,  # type: ignore[arg-type]
    )


def _disk(given: LimitsSpec, loaded: LoadedModel, block_bytes: int) -> dict[str, int | str]:
    """The fields of `Limits` about the disk; how fast it is is tried out where nobody says. Raises SpecError."""
    blocks = given.num_disk_blocks
    if blocks is None:
        blocks = int(GIB * (given.disk_gib or 0) // block_bytes)
    if not blocks:
        return {}
    if not given.disk_folder:
        raise SpecError("limits.disk_folder: say where blocks are to lie, with --disk-folder FOLDER")
    if loaded.ranks.size > 1:
        raise SpecError("limits.num_disk_blocks: a disk tier is for a model on one device so far; leave it out")
    if given.disk_block_us is not None:
        times = (round(1e3 * given.disk_block_us),) * 2
    elif given.disk_gb_s is not None:
        times = (round(block_bytes / given.disk_gb_s),) * 2
    else:
        try:
            times = block_times(given.disk_folder, block_bytes)
        except ModelError as error:
            raise SpecError(str(error)) from error
    read_ns, write_ns = times
    times_of = {"disk_read_ns": read_ns, "disk_write_ns": write_ns}
    return {"num_disk_blocks": blocks, "disk_folder": given.disk_folder, **times_of}


def _host_blocks(given: LimitsSpec, loaded: LoadedModel, block_bytes: int) -> int:
    """Blocks of host memory, of which each rank keeps its part. Raises SpecError where there is not so much."""
    block_bytes *= loaded.ranks.size
    blocks = given.num_host_blocks
    if blocks is None:
        blocks = int(GIB * (given.host_memory_gib or 0) // block_bytes)
    there = _host_bytes()
    if blocks * block_bytes > HOST_SHARE * there:
        raise SpecError(
            f"{blocks} blocks of host memory need {blocks * block_bytes / GIB:,.1f} GiB, and this machine has "
            f"{there / GIB:,.1f} GiB; lower limits.num_host_blocks or --host-memory"
        )
    return blocks


def resolved(spec: RunSpec, loaded: LoadedModel) -> RunSpec:
    """The specification with the attention "fastest" replaced by the name of what is fastest: it is tried out once."""
    if spec.model.attention != "fastest":
        return spec
    dtype = kv_dtype(spec.model) or loaded.model.dtype
    shape = AttentionShape.of(loaded.config, spec.limits.block_size, dtype)
    name = get_backend("fastest", loaded.model.device, shape).name
    return spec.model_copy(update={"model": spec.model.model_copy(update={"attention": name})})


def _capture_ladders(spec: RunSpec, loaded: LoadedModel) -> dict[str, tuple[int, ...]]:
    """What the runner captures, by the names of Limits. Raises SpecError for given sizes where it captures none."""
    device, given = loaded.model.device, spec.limits
    backend, cuda = get_backend(spec.model.attention, device), device.type == "cuda"
    ladders = {}
    for name, captured, default in (
        ("capture_sizes", backend.capturable, default_capture_sizes(given.max_num_seqs)),
        ("mixed_capture_sizes", backend.captures_chunks, default_mixed_capture_sizes(given.max_num_batched_tokens)),
    ):
        sizes = getattr(given, name)
        if sizes and not (cuda and captured):
            raise SpecError(
                f"limits.{name}: attention {backend.name!r} on {device} runs from no captured graphs; leave it out"
            )
        ladders[name] = sizes if sizes is not None else default if cuda and captured else ()
    return ladders


def _memory_there(loaded: LoadedModel) -> int:
    """Bytes: of a GPU what is free, of this machine all it has, as the system makes room."""
    device = loaded.model.device
    if device.type == "cuda":
        return free_bytes(device)
    return _host_bytes()


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known once a model is ready to be served: the specification with "fastest" resolved, the limits, the cost
    model for policies that plan by one, and what the parts of the start took."""

    spec: RunSpec
    limits: Limits
    cost: CostModel | None
    seconds: dict[str, float]


def prepare(spec: RunSpec, loaded: LoadedModel, cost: CostModel | None = None) -> Prepared:
    """Size the replica and warm it up. Raises as `real_limits` does."""
    if cost is None and spec.cost is not None:
        cost = make_costs(spec.cost)
    seconds = {"load": loaded.load_seconds}
    if spec.model.attention == "fastest":
        with timed(seconds, "attention"):
            spec = resolved(spec, loaded)
    with timed(seconds, "memory_profile"):
        limits = real_limits(spec, loaded)
    check_swaps(limits, cost)
    check_offload(spec, limits)
    with timed(seconds, "warm_up"):
        warm_up(loaded, limits, spec, cost)
    return Prepared(spec, limits, cost, seconds)


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
    on_start: Callable[[dict[str, float]], None] | None = None,
) -> None:
    """Serve a specification's workload and write its run folder.

    `workload` and `loaded` may be given where they are at hand already. Interrupted, the engine stops after the step in
    flight and the record stays readable, with what was unfinished marked so. `check`: invariants after every step,
    Little's law at the end. `on_start` gets the seconds that the parts of the start took, before the first request.
    """
    check_servable(spec)
    workload = workload or make_workload(spec.workload)
    if loaded is None:
        with closing(load(spec.model)) as loaded:
            run_real(
                spec, folder, workload=workload, loaded=loaded, cost=cost, overwrite=overwrite, check=check,
                on_output=on_output, on_start=on_start,
            )  # fmt: skip
        return
    prepared = prepare(spec, loaded, cost)
    run_prepared(
        prepared, loaded, folder, workload, overwrite=overwrite, check=check, on_output=on_output, on_start=on_start
    )


def run_prepared(
    prepared: Prepared,
    loaded: LoadedModel,
    folder: Path,
    workload: Workload,
    *,
    runner: ModelRunner | None = None,
    overwrite: bool = False,
    check: bool = False,
    on_output: Callable[[Output], None] | None = None,
    on_start: Callable[[dict[str, float]], None] | None = None,
    timeout_s: float | None = None,
) -> None:
    """As `run_real`, with what is prepared already, on a runner that is there already (`start_runner`).

    Raises TimeoutError where the requests have not ended after `timeout_s`; the record is then incomplete.
    """
    spec, limits, cost = prepared.spec, prepared.limits, prepared.cost
    patience = patience_of(spec)
    oracle = oracle_of(workload, patience)
    build = spec.policies.stack.build
    stack = build(block_size=limits.block_size, seed=spec.seed, oracle=oracle)
    encode = None if loaded.tokenizer is None else loaded.tokenizer.encode
    prompts = prompt_token_ids(workload, encode, loaded.config.vocab_size, spec.seed)
    info = run_info(
        "real",
        spec=spec.model_dump(mode="json"),
        limits=asdict(limits),
        stack=spec.policies.stack.as_dict(),
        clairvoyant=stack.clairvoyant,
        **oracle_entry(oracle, stack.clairvoyant),
        **clients_entry(workload, patience),
        workload=workload.provenance,
        model=loaded.name,
        **({} if cost is None else {"cost": cost.describe()}),
    )
    with (
        RunWriter(folder, info, overwrite=overwrite, decisions=spec.decisions) as writer,
        start_engine(
            *(loaded, limits, stack, spec.model),
            recorder=writer,
            cost=cost,
            seed=spec.seed,
            ids_in_any_order=True,
            check=check,
            runner=runner,
        ) as engine,
    ):
        if on_start is not None:
            on_start({**prepared.seconds, **engine.startup_seconds})
        with few_collections():
            send(engine, spec, workload, prompts, on_output or (lambda output: None), timeout_s)
    if check:
        check_books(read_run(folder))


def start_engine(
    loaded: LoadedModel,
    limits: Limits,
    stack: PolicyStack,
    model: ModelSpec,
    *,
    recorder: Recorder | None = None,
    cost: CostModel | None = None,
    seed: int = 0,
    ids_in_any_order: bool = False,
    check: bool = False,
    runner: ModelRunner | None = None,
    on_flush: Callable[[], None] | None = None,
) -> Engine:
    """An engine with the specification's attention and KV cache, or on a runner that is there already. Raises SpecError
    where the memory runs out."""
    with explained("starting the engine"):
        return Engine(
            loaded,
            limits,
            stack,
            recorder=recorder,
            cost=cost,
            attention=model.attention,
            kv_dtype=kv_dtype(model),
            seed=seed,
            ids_in_any_order=ids_in_any_order,
            check=check,
            runner=runner,
            on_flush=on_flush,
        )


def start_runner(loaded: LoadedModel, limits: Limits, model: ModelSpec) -> ModelRunner:
    """A runner for several engines, one after another: KV cache and graphs are made once. To be closed by the caller.

    Raises SpecError where the memory runs out.
    """
    with explained("starting the runner"):
        plane = ControlPlane(limits, StackSpec().build(block_size=limits.block_size))
        return ModelRunner(loaded, plane, attention=model.attention, kv_dtype=kv_dtype(model))


def warm_up(loaded: LoadedModel, limits: Limits, spec: RunSpec, cost: CostModel | None = None) -> None:
    """Run a few steps of each kind, so that no request of the run pays for first-time work.

    Without captured graphs: the run's own engine captures its own.
    """
    host = min(limits.num_host_blocks, 1)
    limits = replace(limits, capture_sizes=(), mixed_capture_sizes=(), num_host_blocks=host, num_disk_blocks=0)
    stack = spec.policies.stack.build(block_size=limits.block_size, oracle=dict.fromkeys(range(4), WARM_UP_TOKENS))
    length = min(64, limits.max_model_len - WARM_UP_TOKENS, limits.num_blocks * limits.block_size // 8)
    with explained("warming up"), start_engine(loaded, limits, stack, spec.model, cost=cost) as engine:
        prompts = [[1 + i] * max(1, length) for i in range(4)]
        params = SamplingParams(temperature=0, max_tokens=WARM_UP_TOKENS, ignore_eos=True)
        engine.generate(prompts, params)
        engine.raise_if_dead()
    if loaded.model.device.type == "cuda":
        torch.cuda.empty_cache()  # kept for the stream of an engine that is gone
