"""Runs for tests: the real control plane and loop, driven by an executor whose steps take a fixed time."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from experiments.records import Run, RunWriter, read_run, run_info
from policies.contract import Recorder
from policies.control_plane import ControlPlane, RequestRefused
from policies.loop import Collect, Deliver, Idle, Launch, step_loop
from policies.plan import Report, Step
from policies.replica_state import Limits
from policies.request import Request, State
from policies.stack import StackSpec

LIMITS = Limits(
    num_blocks=40,
    block_size=4,
    max_num_seqs=8,
    max_num_batched_tokens=32,
    max_model_len=96,
    prefix_caching=False,
    capture_sizes=(1, 2, 4, 8),
)


@dataclass(frozen=True)
class FakeRequest:
    """What arrives, and the true output length that only the executor knows."""

    arrival_ns: int
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    cancel_ns: int | None = None


def random_requests(n: int, seed: int, cancelled: float = 0.0) -> list[FakeRequest]:
    """`n` requests that together overfill `LIMITS`, so that some wait and some are preempted."""
    draw = random.Random(seed)
    requests, now = [], 0
    for _ in range(n):
        now += draw.randrange(20_000_000)
        output = draw.randint(1, 30)
        cancel = now + draw.randrange(100_000_000) if draw.random() < cancelled else None
        requests.append(FakeRequest(now, draw.randint(1, 40), output, output + draw.choice([0, 5]), cancel))
    return requests


def constant(step: Step) -> int:
    """A step time that hardly depends on the step."""
    return 10_000_000 + 1000 * step.shape.num_tokens


class FakeExecutor:
    """Runs steps of `step_ns` one after another and knows when each request ends."""

    def __init__(self, truth: dict[int, FakeRequest], step_ns: Callable[[Step], int]) -> None:
        self.truth = truth
        self.step_ns = step_ns
        self.free_at = 0
        self.in_flight: dict[int, tuple[int, int, list[Request]]] = {}
        self.sampled = dict.fromkeys(truth, 0)
        self.token_ns: dict[int, list[int]] = {i: [] for i in truth}

    def launch(self, step: Step, group: Sequence[Request], now: int) -> None:
        """Start a step when the one before has ended."""
        members = [*group, *step.capped] if step.decode_all else step.decodes
        sampling = [*members, *(chunk.request for chunk in step.chunks if chunk.samples)]
        start = max(now, self.free_at)
        self.free_at = start + self.step_ns(step)
        self.in_flight[step.index] = (start, self.free_at, sampling)

    def collect(self, step: Step, now: int) -> Report:
        """The report of a step, no sooner than it ends."""
        start, end, sampling = self.in_flight.pop(step.index)
        finished = []
        for request in sampling:
            if not request.state.ended:
                self.sampled[request.id] += 1
                self.token_ns[request.id].append(max(now, end))
                if self.sampled[request.id] == self.truth[request.id].output_tokens:
                    state = State.LENGTH if self.sampled[request.id] == request.max_tokens else State.STOPPED
                    finished.append((request, state, self.sampled[request.id]))
        return Report(step, start, max(now, end), end - start, finished)


def drive(
    recorder: Recorder | None,
    requests: Mapping[int, FakeRequest],
    limits: Limits = LIMITS,
    *,
    stack: StackSpec | None = None,
    step_ns: Callable[[Step], int] = constant,
    max_steps: int | None = None,
    replica: int = 0,
) -> dict[int, list[int]]:
    """Run the requests (by id) to their ends, or until `max_steps` plans; then close the control plane.

    Returns the time of each token by request, as the executor saw them.
    """
    policies = (stack or StackSpec()).build(block_size=limits.block_size)
    plane = ControlPlane(limits, policies, replica=replica, recorder=recorder, check=True)
    executor = FakeExecutor(dict(requests), step_ns)
    arrivals = [(request.arrival_ns, 0, i) for i, request in requests.items()]
    cancellations = [(request.cancel_ns, 1, i) for i, request in requests.items() if request.cancel_ns is not None]
    incoming = deque(sorted(arrivals + cancellations))
    loop, now = step_loop(plane, limits.lag), 0
    answer: int | Report | None = None
    while max_steps is None or plane.next_step < max_steps:
        action = loop.send(answer)
        answer = None
        if isinstance(action, Deliver):
            while incoming and incoming[0][0] <= now:
                at, cancels, i = incoming.popleft()
                if cancels:
                    plane.cancel(i, now)
                else:
                    with suppress(RequestRefused):
                        plane.submit(Request(i, at, requests[i].prompt_tokens, requests[i].max_tokens), now)
            answer = now
        elif isinstance(action, Launch) and action.step.runs:
            executor.launch(action.step, plane.decode_group(), now)
        elif isinstance(action, Collect):
            answer = executor.collect(action.step, now)
            now = answer.end_ns
        elif isinstance(action, Idle):
            if not incoming:
                break
            now = max(now, incoming[0][0])
    plane.close()
    return executor.token_ns


def fake_info(kind: str = "sim", limits: Limits = LIMITS, **more: Any) -> dict[str, Any]:
    """A run.json for it."""
    return run_info(
        kind,
        spec={"seed": 0},
        limits=asdict(limits),
        stack=StackSpec().as_dict(),
        clairvoyant=False,
        workload={"source": "test"},
        **more,
    )


def fake_run(
    folder: Path, requests: Sequence[FakeRequest] | None = None, *, kind: str = "sim", lag: int = 0, **options: Any
) -> Run:
    """Write a run's folder and open it."""
    limits = replace(options.pop("limits", LIMITS), lag=lag)
    with RunWriter(folder, fake_info(kind, limits), flush_seconds=None) as writer:
        chosen = random_requests(60, seed=1) if requests is None else requests
        drive(writer, dict(enumerate(chosen)), limits, **options)
    return read_run(folder)
