"""A benchmark from beginning to end: prompts, warm-up, load, records."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from experiments.bench.load import Counts, Load
from experiments.bench.measuring import Measured
from experiments.bench.prompts import Prompt, Prompts, make_body, make_headers, make_prompts
from experiments.bench.recording import rows
from experiments.bench.spec import BenchSpec
from experiments.records import RunWriter, run_info
from experiments.spec import SpecError
from experiments.workloads import Workload
from policies.collecting import few_collections
from runtime.client import APIError, AsyncClient, Client
from runtime.event_loop import allow_many_connections, run


@dataclass(frozen=True)
class Target:
    """A server, and what it is to be sent.

    Attributes:
        spec: the benchmark.
        workload: its requests.
        prompts: one a request. made_of: what they are made of, in words.
        api_key: sent with every request, kept nowhere.
    """

    spec: BenchSpec
    workload: Workload
    prompts: Prompts
    made_of: str
    api_key: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a benchmark went, beside what its records say.

    Attributes:
        counts: of requests, with the generator's own delays.
        interrupted: it was ended by Ctrl-C.
        without_usage: completed requests whose server did not count tokens: their chunks were counted.
    """

    counts: Counts
    interrupted: bool
    without_usage: int


def prepare(spec: BenchSpec, workload: Workload, api_key: str | None = None) -> Target:
    """Make the prompts. Raises SpecError where the server cannot be reached or lacks what is needed for them, and for a
    closed loop, whose requests have no times of their own."""
    if workload.parents is not None:
        raise SpecError(
            f"{workload.name} is a closed loop, which bench does not send; `diptych run` and `diptych simulate` do"
        )
    if spec.workload.timeout_s is not None:
        raise SpecError("workload.timeout_s: bench has no clients that try again; leave it out, or use `diptych run`")
    with Client(spec.base_url, api_key=api_key) as client:
        try:
            prompts, made_of = make_prompts(workload, spec, client)
        except APIError as error:
            raise SpecError(f"the prompts could not be made: {error}") from error
    return Target(spec, workload, prompts, made_of, api_key)


@few_collections()
def run_bench(
    target: Target, folder: Path, *, overwrite: bool = False, on_tick: Callable[[Counts], None] = lambda counts: None
) -> Outcome:
    """Send the workload and write the run folder.

    Ctrl-C ends it: what has ended is recorded, what was in flight counts as unfinished, and the record as incomplete.
    Raises SpecError where the warm-up fails, RunError where the folder cannot be written.
    """
    spec, workload = target.spec, target.workload
    allow_many_connections()
    run(_warm_up(target))
    info = run_info(
        "client",
        spec=spec.model_dump(mode="json"),
        limits={},
        stack={},
        clairvoyant=False,
        workload=workload.provenance,
        model=spec.model,
        prompts=target.made_of,
    )
    without_usage = 0
    writer = RunWriter(folder, info, overwrite=overwrite)

    def on_end(measured: Measured) -> None:
        nonlocal without_usage
        without_usage += measured.completed and measured.usage is None
        writer.request_seen(*rows(measured, workload, spec))

    counts, whole = Counts(), False
    try:
        with _undisturbed():
            counts, whole = run(_drive(target, on_end, on_tick))
    finally:
        writer.close() if whole else writer.abort()
    return Outcome(counts, not whole, without_usage)


async def _drive(
    target: Target, on_end: Callable[[Measured], None], on_tick: Callable[[Counts], None]
) -> tuple[Counts, bool]:
    """Run the load; whether it came to its end."""
    spec, workload = target.spec, target.workload
    async with _client(target) as client:
        load = _load(client, target, target.prompts, on_end)
        watch = asyncio.create_task(load.watch(on_tick))
        try:
            if spec.concurrency is None:
                await load.open_loop(workload.arrival_ns.tolist())
            else:
                await load.closed_loop(len(workload), spec.concurrency)
        except ExceptionGroup as several:  # of which one says enough, such as that the disk is full
            raise several.exceptions[0] from None
        except asyncio.CancelledError:  # Ctrl-C; those in flight have been handed over as unfinished
            return load.counts, False
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
        return load.counts, True


async def _warm_up(target: Target) -> None:
    """The first requests, with prompts that begin otherwise than those that count: a server may cache prefixes."""
    spec = target.spec
    if not spec.warm_up:
        return
    prompts = [_turned(prompt) for prompt in target.prompts[: spec.warm_up]]
    ended: list[Measured] = []
    async with _client(target) as client:
        load = _load(client, target, prompts, ended.append)
        await load.closed_loop(len(prompts), spec.concurrency or len(prompts))
    failed = next((measured for measured in ended if not measured.completed), None)
    if failed is not None:
        raise SpecError(f"a warm-up request failed: {failed.error} (--warm-up 0 leaves them out)")


def _turned(prompt: Prompt) -> Prompt:
    """The same content from the middle on: another beginning, the same length."""
    half = len(prompt) // 2
    return prompt[half:] + prompt[:half]  # type: ignore[operator,return-value]


def _load(client: AsyncClient, target: Target, prompts: Prompts, on_end: Callable[[Measured], None]) -> Load:
    spec, workload = target.spec, target.workload
    return Load(
        client,
        spec.path,
        lambda i: make_body(workload, spec, prompts, i),
        on_end,
        spec.timeout_s,
        lambda i: make_headers(workload, i),
    )


def _client(target: Target) -> AsyncClient:
    return AsyncClient(target.spec.base_url, api_key=target.api_key, timeout_s=target.spec.timeout_s, retries=0)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the garbage collector from going through every prompt in the middle of a measurement."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
