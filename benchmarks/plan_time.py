"""How long a policy takes to plan a step: `python -m benchmarks.plan_time [--json PATH] [--quick] [--note TEXT]`.

256 requests run while 1,000, 10,000 or 100,000 wait. Four kinds of step are timed, of every registered policy of a
replica's stack (routers have `benchmarks.route_time`):

- every scheduler with queues by arrival, by a key of each request (`sjf`) and by tenant (`vtc`);
- every queue under `mixed`, and under `preemptive` where it orders running requests too, and `preemptive` in each mode;
- every rule for admission, preemption and eviction (the last in cached steps alone) with the defaults in other roles,
  `belady` excepted, which is told all that is to come.

The kinds of step:

decode   nothing changes: everybody who runs decodes, nobody can be admitted
admit    requests have ended, and waiting ones take their places
preempt  blocks are missing, or a queue's order changes, and somebody gives up his
cached   as admit, with prefix caching, prompts of 1,024 tokens (64 blocks to look up and enter in the index), and more
         blocks wanted than there are, so that idle ones are evicted

Two times are taken of each: all of `ControlPlane.plan` (the policy, and carrying out what it says), and the policy's
own `Scheduler.plan`. They are times of this thread on the processor, so that other work on the machine counts little:
it takes the caches, and with 100,000 waiting each request that is looked at for the first time comes from far, which
adds a third or more to a step that starts many.
The reference in the same process is a scheduler that sorts its list of waiting requests in every step and is otherwise
`mixed`. The target is less than a millisecond with 100,000 waiting. Under the tables stands which cases miss it, and
whether that comes from how many wait: whether the same takes as long with 1,000 waiting, or starts and stops fewer
requests there, or grows. `growth` is the time in terms of that with 1,000 waiting. A file beside PATH keeps each case
as it is measured, so that what was stopped goes on, and a case that is taken out of it is measured again.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.plan_rows import NAIVE, WAITING, WHY, Names, Row, show, with_growth
from benchmarks.saving import save
from policies import registry
from policies.contract import RankedQueue, Scheduler, View
from policies.control_plane import ControlPlane
from policies.model_shape import ModelShape
from policies.plan import Plan, Report, Step
from policies.replica_state import Limits
from policies.request import Request, Slo, State
from policies.stack import PolicyStack, StackSpec
from policies.victims import MODES
from simulator.costs.roofline import RooflineCost
from simulator.devices import load_device

RUNNING = 256
BLOCK_SIZE = 16
BUDGET = 2048
HOST_BLOCKS = 4_000
STEP_NS = 10_000_000
MOST_STEPS = 1_000
MOST_SECONDS = 4.0  # for the steps of one case
COST = RooflineCost(ModelShape.preset("llama-3.1-8b").in_dtype("bfloat16"), load_device("h100-sxm"))
KNOBS = {"static": f"static,max_batch_size={RUNNING}", "sarathi": f"sarathi,chunk_size={BUDGET}"}
QUEUES = ("fcfs", "sjf", "vtc")
RANKED = ("fcfs", "sjf")
NAIVE_KEYS: dict[str, Callable[[Request], float]] = {
    "fcfs": lambda r: 0.0,
    "priority": lambda r: r.priority,
    "sjf": lambda r: r.hints["output_tokens"],
}


class SortEveryStep:
    """`mixed` with a waiting list that is sorted in every step: what an indexed queue saves."""

    def __init__(self, key: Callable[[Request], float]) -> None:
        self._key = key
        self._waiting: list[Request] = []

    def add(self, request: Request, now: int) -> None:
        self._waiting.append(request)

    def remove(self, request: Request, now: int) -> None:
        self._waiting.remove(request)

    def on_report(self, report: Report) -> None:
        """The order does not depend on it."""

    def plan(self, view: View, now: int) -> Plan:
        self._waiting.sort(key=lambda request: (self._key(request), *request.key))
        draft = view.draft()
        if not draft.run_everyone():
            for request in list(view.running.values()):
                tokens = min(request.num_pending_tokens, draft.tokens_left)
                if request.id not in draft.preempted and tokens:
                    draft.run_or_preempt(request, tokens, now)
        taken = 0
        while not draft.preempted and taken < len(self._waiting) and draft.admit(self._waiting[taken]):
            taken += 1
        del self._waiting[:taken]
        return draft.finish()


class Timed:
    """A scheduler whose `plan` is timed. Everything else is the scheduler's own."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.add, self.remove, self.on_report = scheduler.add, scheduler.remove, scheduler.on_report
        self.last_ns = 0

    def plan(self, view: View, now: int) -> Plan:
        start = time.thread_time_ns()
        plan = self._scheduler.plan(view, now)
        self.last_ns = time.thread_time_ns() - start
        return plan


@dataclass(frozen=True)
class Kind:
    """A kind of step, and the load in which it comes up: memory, and the span of output lengths."""

    name: str
    num_blocks: int
    shortest: int
    longest: int
    prompt: int = 64
    cached: bool = False

    def length(self, request_id: int) -> int:
        """A request's output: in no order of arrival, the same in every run."""
        return self.shortest + request_id * 7919 % (self.longest - self.shortest + 1)

    def shows(self, step: Step) -> bool:
        """Whether the step is of this kind."""
        full = step.num_decodes >= RUNNING // 2
        return {
            "decode": not step.chunks and not step.preempted and full,
            "admit": bool(step.admitted) and not step.preempted,
            "preempt": bool(step.preempted),
            "cached": bool(step.admitted) and not step.preempted,
        }[self.name]


KINDS = (
    Kind("decode", 40_000, 2_000, 2_000),
    Kind("admit", 40_000, 16, 48),
    Kind("preempt", 1_300, 16, 48),
    Kind("cached", 24_000, 200, 400, 1024, True),
)


class Lengths(Mapping[int, int]):
    """The true output length of any request, for the policies that are told."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind

    def __getitem__(self, request_id: int) -> int:
        return self._kind.length(request_id)

    def __iter__(self) -> Iterator[int]:
        raise TypeError("requests without end")

    def __len__(self) -> int:
        raise TypeError("requests without end")


@functools.cache  # the same in every case: to make them takes longer than to measure
def keys_of(request_id: int, blocks: int) -> tuple[bytes, ...]:
    """Names of a prompt's blocks, of which no two requests have one in common."""
    return tuple(b"%d %d" % (request_id, depth) for depth in range(blocks))


class Load:
    """A replica with `waiting` requests behind those that run; each end is followed by an arrival."""

    def __init__(self, kind: Kind, names: Names, waiting: int) -> None:
        self._kind = kind
        scheduler, queue, admission, preemption, eviction = names
        host = HOST_BLOCKS if any("swap" in name or "cheapest" in name for name in names) else 0
        limits = Limits(
            kind.num_blocks, BLOCK_SIZE, RUNNING, BUDGET, 4096, prefix_caching=kind.cached, num_host_blocks=host
        )
        naive = scheduler == NAIVE
        spec = StackSpec("mixed" if naive else KNOBS.get(scheduler, scheduler), queue, admission, preemption, eviction)
        stack = spec.build(block_size=BLOCK_SIZE, oracle=Lengths(kind))
        self.timed = Timed(SortEveryStep(NAIVE_KEYS[queue]) if naive else stack.scheduler)
        stack = PolicyStack(self.timed, stack.admission, stack.preemption, stack.eviction)
        self.plane = ControlPlane(limits, stack, cost=COST)
        self.now = 0
        self._next_id = 0
        gc.disable()  # it would go through all that wait, again and again, and finds nothing
        for _ in range(waiting + RUNNING):
            self._submit()
        gc.enable()

    def _submit(self) -> None:
        i, kind = self._next_id, self._kind
        self._next_id += 1
        scattered, length = i * 7919, kind.length(i)
        request = Request(
            i,
            self.now,
            kind.prompt,
            length,
            tenant=f"tenant-{scattered % 50}",
            program=scattered % 1000,
            priority=scattered % 5,
            slo=Slo(ttft_ns=(1 + scattered % 7) * 10**12, tpot_ns=10**9),  # attainable, so that nobody is shed
            hints={"output_tokens": float(length)},
        )
        self.plane.submit(request, self.now, keys_of(i, kind.prompt // BLOCK_SIZE) if kind.cached else ())

    def step(self) -> tuple[Step, int]:
        """Plan, run and report one step. Returns it with the time that planning took."""
        start = time.thread_time_ns()
        step = self.plane.plan(self.now)
        taken = time.thread_time_ns() - start
        self.now += STEP_NS
        sampled = [*step.capped, *step.decodes, *(c.request for c in step.chunks if c.samples)]
        ended = [(r, State.LENGTH, r.max_tokens) for r in sampled if r.num_output_tokens >= r.max_tokens]
        if step.runs:
            self.plane.report(Report(step, self.now - STEP_NS, self.now, STEP_NS, ended))
        for _ in ended:
            self._submit()
        return step, taken


def measure(kind: Kind, names: Names, waiting: int, samples: int) -> Row | None:
    """Times of steps of this kind, or None where the scheduler has none."""
    load = Load(kind, names, waiting)
    give_up_at = time.thread_time() + MOST_SECONDS
    while load.plane.num_running < RUNNING // 2 and time.thread_time() < give_up_at:
        load.step()
    for _ in range(5):
        load.step()
    gc.collect()
    plans, schedules, admitted, preempted = [], [], [], []
    give_up_at = time.thread_time() + MOST_SECONDS
    for _ in range(MOST_STEPS):
        if time.thread_time() > give_up_at:
            break
        step, taken = load.step()
        if kind.shows(step):
            plans.append(taken / 1e3)
            schedules.append(load.timed.last_ns / 1e3)
            admitted.append(len(step.admitted))
            preempted.append(len(step.preempted))
            if len(plans) == samples:
                break
    if not plans:
        return None
    return Row(
        scheduler=names[0],
        queue=names[1],
        admission=names[2],
        preemption=names[3],
        eviction=names[4],
        kind=kind.name,
        waiting=waiting,
        steps=len(plans),
        plan_us_median=round(statistics.median(plans), 1),
        plan_us_p99=round(sorted(plans)[int(0.99 * (len(plans) - 1))], 1),
        scheduler_us_median=round(statistics.median(schedules), 1),
        scheduler_us_p99=round(sorted(schedules)[int(0.99 * (len(plans) - 1))], 1),
        admitted_mean=round(statistics.mean(admitted), 2),
        preempted_mean=round(statistics.mean(preempted), 2),
    )


def measure_all(samples: int, console: Console, kept: Path | None) -> list[Row]:
    """Every stack, and the naive reference with fewer samples, as it is slow. `kept`: a file to which each case goes as
    it is measured, and whose cases are not measured again."""
    cases = [(kind, names, waiting) for names in stacks() for kind in kinds_of(names) for waiting in WAITING]
    done: dict[tuple[object, ...], dict[str, Any] | None] = {}
    if kept is not None and kept.exists():
        done = {tuple(case): row for case, row in map(json.loads, kept.read_text().splitlines())}
        console.print(f"{len(done)} of {len(cases)} cases were measured before: {kept}")
    for kind, names, waiting in track(cases, "timing", console=console, transient=True):
        case = named(kind, names, waiting)
        if case not in done:
            row = measure(kind, names, waiting, samples if names[0] != NAIVE else samples // 4)
            done[case] = None if row is None else asdict(row)
            if kept is not None:
                with kept.open("a") as file:
                    file.write(json.dumps((case, done[case])) + "\n")
    return with_growth([Row(**kept_row) for case in cases if (kept_row := done[named(*case)]) is not None])


def named(kind: Kind, names: Names, waiting: int) -> tuple[object, ...]:
    """A case, as a file can hold it."""
    return (kind.name, *names, waiting)


def stacks() -> list[Names]:
    """What is timed."""
    default = StackSpec()
    rest = (default.admission, default.preemption, default.eviction)
    made: list[Names] = []
    for name in registry.names("scheduler"):
        made += [(name, queue, *rest) for queue in QUEUES if name != "preemptive" or queue in RANKED]
    for queue in registry.names("queue"):
        made.append((default.scheduler, queue, *rest))
        if isinstance(registry.make("queue", queue, block_size=BLOCK_SIZE, seed=0, oracle={}), RankedQueue):
            made.append(("preemptive", queue, *rest))
    made += [(f"preemptive,mode={mode}", queue, *rest) for mode in ("keep", "swap", "cheapest") for queue in RANKED]
    for role in ("admission", "preemption", "eviction"):
        for name in registry.names(role):
            spec = replace(default, **{role: name})
            if not spec.wants_future:
                made.append((spec.scheduler, spec.queue, spec.admission, spec.preemption, spec.eviction))
    made += [(default.scheduler, default.queue, rest[0], f"last_admitted,mode={mode}", rest[2]) for mode in MODES[1:]]
    made += [(NAIVE, queue, *rest) for queue in NAIVE_KEYS]
    return list(dict.fromkeys(made))


def kinds_of(names: Names) -> list[Kind]:
    """The kinds of step in which such a stack differs from the default one."""
    return [kind for kind in KINDS if kind.cached or names[4] == StackSpec().eviction]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="save the figures here; what is stopped goes on")
    parser.add_argument("--quick", action="store_true", help="20 steps of each kind instead of 100")
    parser.add_argument("--note", default="", metavar="TEXT", help="about this run, for the file")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)  # a file has room for whole figures
    kept = None if options.json is None else options.json.with_suffix(".partial")
    rows = measure_all(20 if options.quick else 100, console, kept)
    show(rows, RUNNING, console)
    if options.json is not None:
        settings = {
            "running": RUNNING,
            "block_size": BLOCK_SIZE,
            "max_num_batched_tokens": BUDGET,
            "prompt_tokens": {kind.name: kind.prompt for kind in KINDS},
            "cost": "roofline of llama-3.1-8b on h100-sxm",
            "host_blocks": HOST_BLOCKS,
            "why": WHY,
            "note": options.note,
        }
        save(options.json, "plan_time", settings, rows)
        options.json.with_suffix(".partial").unlink()
        console.print(f"saved to {options.json}")


if __name__ == "__main__":
    main()
