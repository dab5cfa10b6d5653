"""`diptych run` and `diptych simulate`."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Annotated

import pyarrow.compute as pc
import typer
from pydantic import TypeAdapter
from rich.progress import TaskID

from experiments.cli import options
from experiments.cli.app import app, complain, console
from experiments.cli.options import default_folder, gather, interruptible, progress
from experiments.cli.summary import startup_line, summary_table
from experiments.compare import compare
from experiments.records import Run, check_free, read_run
from experiments.render import comparison_table
from experiments.spec import CostSpec, RunSpec, SpecError
from experiments.workloads import make_workload
from policies.replica_state import Limits
from policies.request import Request
from policies.shapes import StepShape
from simulator.costs.base import CostModel, predicted
from simulator.costs.fitted import FittedCost


@app.command()
def run(
    context: typer.Context,
    spec: options.Spec = None,
    workload: options.Workload = None,
    requests: options.Requests = None,
    rate: options.Rate = None,
    seed: options.Seed = None,
    model: options.Model = None,
    tensor_parallel: options.TensorParallel = None,
    scheduler: options.Scheduler = None,
    queue: options.Queue = None,
    admission: options.Admission = None,
    preemption: options.Preemption = None,
    eviction: options.Eviction = None,
    offload: options.Offload = None,
    host_memory: options.HostMemory = None,
    disk: options.Disk = None,
    disk_folder: options.DiskFolder = None,
    settings: options.Set = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    check: options.Check = False,
) -> None:
    """Serve a workload with the real runtime and record the run.

    On a GPU: --set model.device=cuda --set model.dtype=bfloat16, and where memory is short --set model.quantization=fp8
    or --set model.kv_cache_dtype=fp8.

    Example: diptych run -w chat -n 32 --rate 2 --set workload.length_scale=0.1 --scheduler sarathi,chunk_size=128
    """
    specification = gather(context, model__source=model)
    if specification.target == "sim":
        _simulate(specification, out or default_folder(specification, "sim"), overwrite, check)
    elif specification.target == "real":
        _serve(specification, out or default_folder(specification, "real"), overwrite, check)
    else:
        folder = out or default_folder(specification, "both")
        check_free(folder / "sim", overwrite)
        _serve(specification, folder / "real", overwrite, check)
        _simulate(specification, folder / "sim", overwrite, check, limits=limits_of(folder / "real"))
        console.print(comparison_table(compare(read_run(folder / "real"), read_run(folder / "sim"))))


@app.command()
def simulate(
    context: typer.Context,
    spec: options.Spec = None,
    workload: options.Workload = None,
    requests: options.Requests = None,
    rate: options.Rate = None,
    seed: options.Seed = None,
    model: options.Model = None,
    device: Annotated[str | None, typer.Option(help="h100-sxm, h200, a100-80gb, l4, cpu, or a file of one.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="A file that `diptych profile` wrote.")] = None,
    residuals: Annotated[
        int | None,
        typer.Option(metavar="SEED", help="Draw the errors of --calibration's fit; several seeds give a band."),
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="How many, behind --router.")] = None,
    link: Annotated[str | None, typer.Option(help="Between replicas, for routers that move KV: 50GB/s.")] = None,
    scheduler: options.Scheduler = None,
    queue: options.Queue = None,
    admission: options.Admission = None,
    preemption: options.Preemption = None,
    eviction: options.Eviction = None,
    offload: options.Offload = None,
    host_memory: options.HostMemory = None,
    disk: options.Disk = None,
    disk_folder: options.DiskFolder = None,
    router: options.Router = None,
    pools: options.Pool = None,
    autoscaler: options.Autoscaler = None,
    settings: options.Set = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    check: options.Check = False,
) -> None:
    """Simulate a workload: on a device from its data sheet, or with measured step times (--calibration).

    Example: diptych simulate --workload chat -n 2000 --rate 8 --model llama-3.1-8b --device h100-sxm --scheduler mixed
    """
    if calibration is not None and (model or device):
        raise SpecError("--calibration has measured a model on a device; leave --model and --device out")
    specification = gather(
        context,
        target="sim",
        cost__model=model,
        cost__device=device,
        cost__calibration=None if calibration is None else str(calibration),
        cost__kind=None if calibration is None else "fitted",
        cost__residuals=residuals,
    )
    _simulate(specification, out or default_folder(specification, "sim"), overwrite, check)


def limits_of(folder: Path) -> Limits:
    """The limits that a recorded run had."""
    return TypeAdapter(Limits).validate_python(read_run(folder).limits)


def share_outside(costs: CostModel, run: Run) -> float:
    """Share of a run's steps whose cost a fitted model had to extrapolate; 0 for a model that was not measured."""
    costs = predicted(costs)
    if not isinstance(costs, FittedCost):
        return 0.0
    steps = run.columns("steps", StepShape._fields)
    ran = steps.filter(pc.greater(pc.add(steps["num_decodes"], steps["num_chunks"]), 0))
    shapes = (
        StepShape(*row) for batch in ran.to_batches(65_536) for row in zip(*batch.to_pydict().values(), strict=True)
    )
    return sum(not costs.inside(shape) for shape in shapes) / len(ran) if len(ran) else 0.0


def _say_what_was_refused(run: Run) -> None:
    """A run with refused requests has served the others; the first refusal is said, and the exit status is 1."""
    names = ["request_id", "status", "error", "prompt_tokens", "max_tokens"]
    table = run.columns("requests", names)
    refused = table.filter(pc.equal(table["status"], "refused")).to_pandas()
    if len(refused):
        first, limits = refused.iloc[0], run.limits
        longest = min(limits["max_model_len"], limits["num_blocks"] * limits["block_size"])
        too_long = first["prompt_tokens"] + first["max_tokens"] > longest
        complain(
            f"{len(refused)} of {len(table)} requests were refused, the first one (request "
            f"{first['request_id']}) because {first['error']}"
            + (f". To cut what is too long: --set workload.max_model_len={longest}" if too_long else "")
        )
        raise typer.Exit(1)


def _cost_name(cost: CostSpec) -> str:
    """What a simulation is of."""
    if cost.kind == "fitted":
        return f"as measured in {cost.calibration}"
    if cost.kind == "constant":
        return f"every step {cost.step_ms:g} ms"
    return f"{cost.model} in {cost.dtype} on {cost.device}"


def _simulate(spec: RunSpec, folder: Path, overwrite: bool, check: bool, limits: Limits | None = None) -> None:
    from experiments.simulated import make_costs, run_simulated

    check_free(folder, overwrite)
    cost = spec.cost or CostSpec()
    spec = spec.model_copy(update={"cost": cost})
    costs = make_costs(cost)
    workload = make_workload(spec.workload)
    started = time.perf_counter()
    with interruptible(folder), progress("simulating", len(workload)) as bar:
        every = max(1, len(workload) // 200)  # a bar that moves costs more than a simulated step
        ended = until_ns = 0

        def on_end(request: Request) -> None:
            nonlocal ended, until_ns
            until_ns = max(until_ns, request.finish_ns or 0)
            if request.id >= len(workload):
                return  # a further try
            ended += 1
            if ended % every == 0:
                speed = until_ns / 1e9 / (time.perf_counter() - started)
                bar.update(TaskID(0), completed=ended, description=f"simulating, {speed:,.3g} x real time")

        simulated_ns = run_simulated(
            spec, folder, workload=workload, costs=costs, limits=limits, overwrite=overwrite, check=check, on_end=on_end
        )
    took = time.perf_counter() - started
    finished = read_run(folder)
    console.print(summary_table(finished, _cost_name(cost)))
    console.print(
        f"{len(workload):,} requests, {finished.num_rows('steps'):,} steps, {simulated_ns / 1e9:,.1f} s simulated in "
        f"{took:.1f} s ({len(workload) / took:,.0f} requests a second). Records: {folder}"
    )
    outside = share_outside(costs, finished)
    if outside:
        console.print(f"{100 * outside:.1f}% of the steps lie outside what the calibration measured")
    _say_what_was_refused(finished)


def _serve(spec: RunSpec, folder: Path, overwrite: bool, check: bool) -> None:
    from experiments.real import check_servable, load, run_real  # torch is slow to import, and only needed here

    check_free(folder, overwrite)
    check_servable(spec)
    workload = make_workload(spec.workload)
    console.print(f"loading {spec.model.source}")
    with (
        closing(load(spec.model)) as loaded,
        interruptible(folder),
        progress("serving", len(workload)) as bar,
    ):

        def on_output(output: object) -> None:
            if getattr(output, "finish_reason", None) is not None:
                bar.advance(TaskID(0))

        def on_start(seconds: dict[str, float]) -> None:
            console.print(startup_line(seconds))

        run_real(
            spec,
            folder,
            workload=workload,
            loaded=loaded,
            overwrite=overwrite,
            check=check,
            on_output=on_output,
            on_start=on_start,
        )
    finished = read_run(folder)
    console.print(summary_table(finished, f"{loaded.name} in {spec.model.dtype} on {spec.model.device}"))
    console.print(f"Records: {folder}")
    _say_what_was_refused(finished)
