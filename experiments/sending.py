"""Sending a workload to an engine: each request at its time, or after those that it follows."""

from __future__ import annotations

import heapq
import queue
import time
from collections import deque
from collections.abc import Callable

from experiments.clients import Clients
from experiments.coming import request_details
from experiments.simulated import patience_of
from experiments.spec import RunSpec
from experiments.workloads import Workload
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

    Ids are those of `experiments.clients`. Raises TimeoutError where, after `timeout_s`, some have not ended and
    none is still to be handed in, EngineDead where the engine stops.
    """
    ends: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()  # request, when
    start = time.monotonic_ns()

    def listen(output: Output) -> None:
        on_output(output)
        if output.finish_reason is not None:
            ends.put((output.request_id, time.monotonic_ns() - start))

    clients = Clients(workload, patience_of(spec))
    due = clients.first()  # in order, and so a heap
    deadlines: deque[tuple[int, int]] = deque()  # of those that run, and of some that have ended
    running: set[int] = set()
    while clients.waiting:
        while deadlines and deadlines[0][1] not in running:
            deadlines.popleft()
        passed = time.monotonic_ns() - start
        if due and due[0][0] <= passed:
            _, request_id = heapq.heappop(due)
            running.add(request_id)
            if clients.patience.timeout_ns is not None:
                deadlines.append((passed + clients.patience.timeout_ns, request_id))
            _submit(engine, spec, clients, request_id, prompts, listen)
            continue
        if deadlines and deadlines[0][0] <= passed and ends.empty():
            _, request_id = deadlines.popleft()
            for again in clients.gives_up(request_id, passed):
                heapq.heappush(due, again)
            engine.cancel(request_id)
            continue
        next_times = [queued[0][0] for queued in (due, deadlines) if queued]
        until = min(next_times) if next_times else None if timeout_s is None else round(1e9 * timeout_s)
        try:
            ended, at = ends.get(timeout=None if until is None else max(0, until - passed) / 1e9)
        except queue.Empty:
            if not next_times:
                raise TimeoutError(f"the requests have not ended after {timeout_s:.0f} s") from None
            continue
        running.discard(ended)
        for soon in clients.ended(ended, at):
            heapq.heappush(due, soon)
    engine.raise_if_dead()


def _submit(
    engine: Engine,
    spec: RunSpec,
    clients: Clients,
    request_id: int,
    prompts: list[list[int]],
    listen: Callable[[Output], None],
) -> None:
    workload, (i, _) = clients.workload, clients.row(request_id)
    params = SamplingParams(temperature=0, max_tokens=int(workload.max_tokens[i]), ignore_eos=spec.forced_lengths)
    known = request_details(workload, i)
    forced = int(workload.output_tokens[i]) if spec.forced_lengths else None
    details = Details(
        *(known.tenant, known.session, known.program, clients.parents(request_id)),
        *(known.priority, known.slo, known.hints),
        forced_length=forced,
    )
    engine.submit(prompts[i], params, listen, details, request_id)
