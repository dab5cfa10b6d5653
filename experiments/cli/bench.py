"""`diptych bench`."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.progress import TaskID
from rich.text import Text

from experiments.cli import options
from experiments.cli.app import app, complain, console
from experiments.cli.failures import INTERRUPTED
from experiments.cli.options import folder_of, gather, make_parent, progress
from experiments.cli.summary import summary_table
from experiments.compare import format_figure
from experiments.metrics import summarize
from experiments.records import Run, check_free, read_run
from experiments.spec import RunSpec, SpecError
from experiments.workloads import make_workload

if TYPE_CHECKING:
    from experiments.bench import BenchSpec, Outcome
    from experiments.bench.load import Counts

MS = 1_000_000
_OF_A_RUN = ("workload.", "seed=", "forced_lengths=")
"""What of a run's specification is not the server's to say."""


@app.command()
def bench(
    context: typer.Context,
    spec: options.Spec = None,
    base_url: Annotated[str, typer.Option(help="The server, with or without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option("--model", "-m", help="As the server names it; its first one.")] = None,
    workload: options.Workload = None,
    requests: options.Requests = None,
    rate: options.Rate = None,
    speed_up: Annotated[float | None, typer.Option(help="Send a trace so many times as fast.", min=1e-6)] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Closed loop: so many at once, whatever the arrival times.", min=1)
    ] = None,
    api: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    prompts: Annotated[str | None, typer.Option(help="ids (token ids) or text; of the chat API always text.")] = None,
    ignore_eos: Annotated[
        bool | None, typer.Option("--ignore-eos/--no-ignore-eos", help="Answers as long as the workload says, or not.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="The server's default where it is not given.")] = None,
    extra_body: Annotated[str | None, typer.Option(help="A JSON object of further fields for every request.")] = None,
    warm_up: Annotated[int, typer.Option(help="Requests before the first that counts.", min=0)] = 1,
    wait: Annotated[float, typer.Option(help="Seconds to wait for a server that is just starting.", min=0)] = 0.0,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request has failed.")] = 3600.0,
    tokenizer: options.Tokenizer = None,
    vocab_size: options.VocabSize = None,
    api_key: options.ApiKey = None,
    goodput: options.Goodput = None,
    save_result: Annotated[Path | None, typer.Option(help="Write vllm bench serve's result keys to this file.")] = None,
    save_detailed: Annotated[bool, typer.Option(help="In it, the figures of every request too.")] = False,
    seed: options.Seed = None,
    settings: options.Set = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run (runs/WORKLOAD-client).")] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Drive an OpenAI-compatible server, this project's or another, with a workload, and measure it from outside.

    By default each request is sent at its time: at --rate, or by a trace's own times (--speed-up 2: twice as fast).
    With --concurrency so many clients each send the next request when their last one has ended. Ctrl-C keeps what was
    measured. Exit status 1 if a request failed.

    Example: diptych bench --base-url http://127.0.0.1:8000 -w chat -n 200 --rate 4 --save-result result.json
    """
    _check_settings(settings or [])
    if concurrency is not None and (rate is not None or speed_up is not None):
        raise SpecError("--concurrency sends a request when another has ended; leave --rate and --speed-up out")
    given = gather(context)
    slo = options.objectives(goodput or [])
    folder = out or folder_of(given, "client")
    check_free(folder, overwrite)
    if save_result is not None:
        make_parent(save_result)
    from experiments.bench.spec import check_bench  # what it imports takes its time

    served = models(base_url, api_key, wait) if model is None or wait else []
    specification = check_bench(
        base_url=base_url,
        model=model or served[0],
        workload=_sped_up(given, speed_up),
        seed=given.seed,
        api=api,
        concurrency=concurrency,
        ignore_eos=given.forced_lengths if ignore_eos is None else ignore_eos,
        temperature=temperature,
        extra_body=_json_object(extra_body),
        warm_up=warm_up,
        timeout_s=timeout,
        tokenizer=None if tokenizer is None else str(tokenizer),
        vocab_size=vocab_size,
        **({} if prompts is None else {"prompts": prompts}),
    )
    outcome = _run(specification, folder, overwrite, api_key)
    run = read_run(folder)
    _tell(run, outcome, specification, slo)
    if save_result is not None:
        _save(save_result, run, slo, save_detailed)
    console.print(f"Records: {folder}")
    if outcome.interrupted:
        complain(f"interrupted; what was measured until then is in {folder}")
        raise typer.Exit(INTERRUPTED)
    if outcome.counts.failed:
        raise typer.Exit(1)


def _tell(run: Run, outcome: Outcome, spec: BenchSpec, slo: dict[str, float]) -> None:
    console.print(summary_table(run, f"{spec.model} at {spec.base_url}"))
    if slo:
        console.print(
            f"Goodput: {format_figure(summarize(run, slo)['request_goodput'])} requests/s met every objective"
        )
    _say_how_it_went(run, outcome)


def _save(path: Path, run: Run, slo: dict[str, float], detailed: bool) -> None:
    from experiments.bench import result_json

    result = result_json(run, slo or None, detailed=detailed)
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    console.print(f"Result: {path}")


def _run(spec: BenchSpec, folder: Path, overwrite: bool, api_key: str | None) -> Outcome:
    from experiments.bench import prepare, run_bench

    workload = make_workload(spec.workload)
    with console.status("making the prompts"):
        target = prepare(spec, workload, api_key)
    console.print(f"{len(workload):,} prompts of {target.made_of}, {spec.warm_up} to warm up")
    with progress("sending", len(workload)) as bar:

        def on_tick(counts: Counts) -> None:
            elapsed = bar.tasks[0].elapsed or 0.0
            pace = f"{counts.ended / elapsed:,.1f} req/s" if elapsed else ""
            text = f"{pace}, {counts.running:,} running, {counts.failed:,} failed"
            bar.update(TaskID(0), completed=counts.ended, description=text)

        return run_bench(target, folder, overwrite=overwrite, on_tick=on_tick)


def _say_how_it_went(run: Run, outcome: Outcome) -> None:
    """What a reader of the table must know: who failed and why, and whether the generator kept up."""
    from experiments.bench.load import LATE_MS

    failed = run.requests[run.requests["status"].isin(("failed", "refused"))]
    if len(failed):
        complain(f"{len(failed)} of {len(run.requests)} requests failed:")
        for error, times in Counter(failed["error"]).most_common(5):
            complain(f"  {times} x {error}")
    if outcome.without_usage:
        console.print(
            f"{outcome.without_usage} answers came without usage: their chunks were counted in place of tokens"
        )
    late, lag = outcome.counts.late_ns / MS, outcome.counts.lag_ns / MS
    line = f"Largest lateness of a submission {late:.1f} ms, of the event loop {lag:.1f} ms"
    if max(late, lag) > LATE_MS:
        line += ": this generator fell behind, and its delays are in the figures; lower the rate, or share it out"
        console.print(Text(line, style="yellow"))
    else:
        console.print(line)


def _check_settings(settings: list[str]) -> None:
    for setting in settings:
        if not setting.lstrip().startswith(_OF_A_RUN):
            raise SpecError(
                f"--set {setting}: the server has its own; of a specification bench takes workload, seed and "
                "forced_lengths"
            )


def _sped_up(spec: RunSpec, speed_up: float | None) -> dict[str, Any]:
    """The workload's fields, its time scaled."""
    fields = spec.workload.model_dump()
    if speed_up is not None:
        fields["time_scale"] /= speed_up
    return fields


def models(base_url: str, api_key: str | None, wait_s: float) -> list[str]:
    """The models that are served; asked until there is an answer, or until the time is up."""
    from runtime.client import APIConnectionError, APIError, Client, OverloadedError

    until = time.monotonic() + wait_s
    with Client(base_url, api_key=api_key, retries=0) as client, console.status("asking the server for its models"):
        while True:
            try:
                found = client.models()
                break
            except APIError as error:
                starting = isinstance(error, APIConnectionError | OverloadedError)
                if not starting or time.monotonic() > until:
                    raise SpecError(f"the server was asked for its models: {error}") from error
                time.sleep(0.5)
    if not found:
        raise SpecError(f"{base_url} serves no model; start it with one")
    return found


def _json_object(text: str | None) -> dict[str, Any]:
    try:
        found = {} if text is None else yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise SpecError(f"--extra-body {text}: write a JSON object, as '{{\"top_k\": 1}}'")
    return found
