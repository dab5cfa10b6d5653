"""`diptych capacity`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.at_once import throughput_at_once
from experiments.capacity.asking import Ask, in_panel, on_server
from experiments.capacity.objectives import Objective, parse_objectives
from experiments.capacity.search import MOST, TOLERANCE, Found, Probe, find, rounded, summary_line
from experiments.cli import options
from experiments.cli.app import app, complain, console
from experiments.cli.failures import INTERRUPTED
from experiments.cli.options import folder_of, gather
from experiments.compare import format_figure
from experiments.spec import RunSpec, SpecError
from experiments.sweeps import LocalRunner, Measure, Window
from experiments.sweeps.cell_run import write_json
from experiments.sweeps.spec import Panel
from experiments.workloads import make_workload

CONFIRMING, CLOSE = 5, 1.1
"""Real runs after a simulation's answer, and the first step away from it."""

Start = Annotated[
    float | None,
    typer.Option(
        help="Where the search begins, requests a second (what the simulator finishes where all come at once; "
        "1 with --panel real)."
    ),
]


@app.command()
def capacity(
    context: typer.Context,
    spec: options.Spec = None,
    slo: Annotated[
        list[str] | None,
        typer.Option(help="A limit: p99_ttft:200 (ms), mean_tpot:30, p90_e2el:5000, goodput:0.9; may be repeated."),
    ] = None,
    goodput: options.Goodput = None,
    panel: Annotated[str, typer.Option(help="sim, real, or both: the simulator, then a few real runs.")] = "sim",
    base_url: Annotated[
        str | None, typer.Option(help="Ask this server, from outside; with --panel both after the simulator.")
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="As the server names it; its first one.")] = None,
    tokenizer: options.Tokenizer = None,
    vocab_size: options.VocabSize = None,
    api_key: options.ApiKey = None,
    workload: options.Workload = None,
    requests: options.Requests = None,
    rate: Start = None,
    seeds: Annotated[int, typer.Option(help="Runs of each rate, for a confidence interval.", min=1)] = 1,
    skip_first: Annotated[float, typer.Option(help="Share of the arrivals that is warm-up.", min=0, max=0.9)] = 0.1,
    skip_last: Annotated[float, typer.Option(help="Share of the arrivals that is left out at the end.", min=0)] = 0.0,
    tolerance: Annotated[float, typer.Option(help="How close, relatively.", min=1e-4, max=1)] = TOLERANCE,
    probes: Annotated[int, typer.Option(help="Rates that are tried, at most.", min=1)] = MOST,
    replicas: Annotated[int | None, typer.Option(help="How many, behind --router.")] = None,
    scheduler: options.Scheduler = None,
    queue: options.Queue = None,
    admission: options.Admission = None,
    preemption: options.Preemption = None,
    eviction: options.Eviction = None,
    router: options.Router = None,
    settings: options.Set = None,
    processes: Annotated[int | None, typer.Option(help="Simulations at once (one a seed).", min=1)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Of the runs (runs/WORKLOAD-capacity).")] = None,
) -> None:
    """Find the highest rate at which every limit is met and the queue holds.

    A workload's time is compressed or its users are multiplied, as --rate of `diptych simulate` does, with the same
    seeds at every rate. Without --slo it is the rate that the queue can bear. Runs are kept: what was stopped goes on.

    Example: diptych capacity -w chat -n 1000 --slo p99_ttft:500 --slo p99_tpot:50 --seeds 3
    """
    if panel not in ("sim", "real", "both"):
        raise SpecError(f"--panel {panel}: write sim, real or both")
    if base_url is not None and panel == "sim":
        panel = "real"
    specification = gather(context, target="real")
    limits = options.objectives(goodput or [])
    asked = parse_objectives(slo or [])
    _check(asked, limits, specification)
    folder = out or folder_of(specification, "capacity")
    measure = Measure(window=Window(skip_first=skip_first, skip_last=skip_last), slo=limits)
    start = specification.workload.rate or (1.0 if panel == "real" else _first_guess(specification))
    few = {"most": min(probes, CONFIRMING), "factor": CLOSE} if panel == "both" else {"most": probes}
    answers: dict[str, Found] = {}
    with LocalRunner(processes or seeds) as runner:

        def asking(which: Panel) -> Ask:
            if which == "real" and base_url is not None:
                server = _server(base_url, model_name, tokenizer, vocab_size, api_key)
                return on_server(server, specification, range(seeds), asked, measure, folder, api_key, tolerance)
            return in_panel(specification, which, seeds, asked, measure, folder, runner, tolerance)

        try:
            if panel != "real":
                answers["sim"] = _search("simulated", asking("sim"), start, tolerance=tolerance, most=probes)
                start = answers["sim"].low or start
            if panel != "sim":
                answers["real"] = _search("real", asking("real"), start, tolerance=tolerance, **few)
        except KeyboardInterrupt:
            complain(f"interrupted; the runs that have ended are in {folder}, and the same command goes on from there")
            raise typer.Exit(INTERRUPTED) from None
    asked_for = {"spec": specification.model_dump(mode="json"), "seeds": seeds, "tolerance": tolerance}
    _tell(answers, [str(objective) for objective in asked], measure, asked_for, folder)
    if any(found.low is None for found in answers.values()):
        raise typer.Exit(1)


def _first_guess(spec: RunSpec) -> float:
    """Where a search begins that was not told; 1 where requests follow from each other, or none completes."""
    workload = make_workload(spec.workload)
    if workload.parents is not None:
        return 1.0
    with console.status("simulated: all at once, for a rate to begin with"):
        return rounded(throughput_at_once(spec, workload)) or 1.0


def _tell(
    answers: dict[str, Found], objectives: list[str], measure: Measure, asked_for: dict[str, Any], folder: Path
) -> None:
    """On the terminal and in capacity.json."""
    for name, found in answers.items():
        console.print(f"{name}: {summary_line(found, objectives)}")
    console.print(f"Counted: {measure.window}. Runs and capacity.json: {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        **asked_for,
        "objectives": objectives,
        "measure": measure.model_dump(mode="json"),
        "answers": {name: _as_json(found) for name, found in answers.items()},
    }
    write_json(folder / "capacity.json", content)


def _check(asked: tuple[Objective, ...], limits: dict[str, float], spec: RunSpec) -> None:
    if any(one.figure == "attainment" for one in asked) and not limits and spec.workload.slo is None:
        raise SpecError("--slo goodput: say what a request has to meet: --goodput ttft:500, or workload.slo")
    if spec.workload.arrivals == "at-once" or spec.workload.time_scale != 1:
        raise SpecError("capacity sets the rate: leave workload.arrivals=at-once and workload.time_scale out")


def _server(
    base_url: str, model: str | None, tokenizer: Path | None, vocab_size: int | None, api_key: str | None
) -> dict[str, Any]:
    """What a benchmark is told of the server."""
    from experiments.cli.bench import models

    return {
        "base_url": base_url,
        "model": model or models(base_url, api_key, 0.0)[0],
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "vocab_size": vocab_size,
    }


def _search(name: str, ask: Ask, start: float, **how: Any) -> Found:
    """`find`, with a line a probe."""

    def told(rate: float) -> Probe:
        with console.status(f"{name}: {rate:g} requests/s"):
            probe = ask(rate)
        load = probe.load
        half = "" if load.half is None else f" ± {format_figure(100 * load.half)}"
        share = f"{format_figure(100 * load.mean)}{half} % of {probe.worst}" if probe.worst else "no limits"
        state = "" if probe.stable else ", the queue grows"
        console.print(f"{name}: {rate:10.6g} requests/s {'will do' if probe.will_do else 'too many'}: {share}{state}")
        return probe

    return find(told, start, **how)


def _as_json(found: Found) -> dict[str, Any]:
    probes = [{**asdict(probe), "will_do": probe.will_do} for probe in found.probes]
    plain = {"low": found.low, "high": found.high, "confident": found.confident, "probes": probes}
    return dict(json.loads(json.dumps(plain).replace("Infinity", "null")))
