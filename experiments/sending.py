"""Sending a workload to an engine: each request at its time, or after those that it follows."""

from __future__ import annotations

import heapq
import queue
import time
from collections.abc import Callable

from experiments.simulated import request_details
from experiments.spec import RunSpec
from experiments.workloads import Workload
from experiments.workloads.closed_loop import Followers
from runtime.engine import Details, Engine
from runtime.sampling.params import SamplingParams
from runtime.sequence import Output


def send(
    engine: Engine,
    spec: RunSpec,
    workload: Workload,
    prompts: list[list[int]],
    on_output: Callable[[Output], None],
    timeout_s: float | None = None,
) -> None:
    """Hand in all requests, those that follow nobody at their times, counted from now, and wait for the last to end.

    Ids are numbers of the workload's requests. Raises TimeoutError where, after `timeout_s`, some have not ended and
    none is still to be handed in, EngineDead where the engine stops.
    """
    ends: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()  # request, when
    start = time.monotonic_ns()

    def listen(output: Output) -> None:
        on_output(output)
        if output.finish_reason is not None:
            ends.put((output.request_id, time.monotonic_ns() - start))

    followers, left = Followers(workload), len(workload)
    alone = range(left) if workload.parents is None else [i for i, of in enumerate(workload.parents) if not of]
    due = [(int(workload.arrival_ns[i]), i) for i in alone]  # in order, and so a heap
    while left:
        passed = time.monotonic_ns() - start
        if due and due[0][0] <= passed:
            _, i = heapq.heappop(due)
            engine.submit(prompts[i], _params(spec, workload, i), listen, _details(spec, workload, i), i)
            continue
        until = due[0][0] if due else None if timeout_s is None else round(1e9 * timeout_s)
        try:
            ended, at = ends.get(timeout=None if until is None else max(0, until - passed) / 1e9)
        except queue.Empty:
            if not due:
                raise TimeoutError(f"the requests have not ended after {timeout_s:.0f} s") from None
            continue
        left -= 1
        for soon in followers.ended(ended, at):
            heapq.heappush(due, soon)
    engine.raise_if_dead()


def _params(spec: RunSpec, workload: Workload, i: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=int(workload.max_tokens[i]), ignore_eos=spec.forced_lengths)


def _details(spec: RunSpec, workload: Workload, i: int) -> Details:
    known = request_details(workload, i)
    forced = int(workload.output_tokens[i]) if spec.forced_lengths else None
    return Details(
        *(known.tenant, known.session, known.program, known.parents, known.priority, known.slo, known.hints),
        forced_length=forced,
    )
