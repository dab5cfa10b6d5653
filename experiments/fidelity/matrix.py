"""Which runs are made in both panels: workloads, loads and policies, the most telling ones first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.spec import SpecError
from experiments.workloads import WorkloadSpec, make_workload

SLOS = [
    {"ttft_ms": 500, "tpot_ms": 50, "priority": 0},
    {"ttft_ms": 5000, "tpot_ms": 200, "priority": 1},
]
"""Half of the requests each, for policies that go by objectives."""
TENANTS = {"a": 8.0, "b": 4.0, "c": 2.0, "d": 1.0}
CAPACITY = "capacity"
"""In place of a load: all requests at once, for the sustained capacity (see `experiments.fidelity.capacity`)."""
USUAL, BUSY = 0.85, 0.95
LOADS = (0.5, 0.7, USUAL, BUSY, 1.1, 1.25, 1.5)
"""Shares of that. Above 1 requests pile up, for as long as they come: that is where objectives are missed, and so where
the capacity under them is."""
LAST = "bursts"
"""A workload of arrivals that differ, not of requests that do: the others come first."""
LADDER = (USUAL, 1.5, 1.25, 1.1, BUSY, 0.7, 0.5)
"""The order in which loads are added: around the point where objectives are missed first."""

POLICIES: dict[str, dict[str, str]] = {
    "mixed": {},
    "prefill_first": {"scheduler": "prefill_first"},
    "sarathi": {"scheduler": "sarathi,chunk_size=512"},
    "sjf": {"queue": "sjf"},
    "edf": {"queue": "edf"},
    "vtc": {"queue": "vtc"},
    "preemptive": {"scheduler": "preemptive", "queue": "srpt"},
    "orca": {"scheduler": "orca"},
}
"""Short name -> roles that are not as by default. The first one is what capacity is measured with."""


@dataclass(frozen=True)
class Work:
    """A workload, and limits that are its own.

    Attributes:
        workload: fields of a WorkloadSpec, but for how many and when.
        limits: fields of a LimitsSpec in place of the base's.
        drawn_at: req/s that arrivals are drawn at, before they are moved to the rate of a load: low for sessions whose
            turns lie minutes apart.
        at_once: its requests can all come at once; else they come 10 times faster than expected.
        pace: its capacity beside that of chat, roughly: how many requests there are.
        at_most: so many of it run at once, roughly, where that is fewer than may.
        policies: names of policies beside the usual ones, for this one alone.
    """

    workload: Mapping[str, Any]
    limits: Mapping[str, Any] = field(default_factory=dict)
    drawn_at: float = 10.0
    at_once: bool = True
    pace: float = 1.0
    at_most: int | None = None
    policies: Mapping[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """How long things take.

    A workload has the same requests at every load, so many as take `cell_seconds` at a capacity of `guess` req/s (for
    chat), and `fewest_requests`, but for its pace; the run that measures capacity has these and as many more as run at
    once.
    """

    profile_seconds: float = 100.0
    cell_seconds: float = 20.0
    fewest_requests: int = 250
    timeout_factor: float = 5.0
    guess: float = 20.0

    def num_requests(self, work: Work) -> int:
        return max(self.fewest_requests, round(self.guess * work.pace * self.cell_seconds))


QUICK_SIZES = Sizes(profile_seconds=3, cell_seconds=1.5, fewest_requests=20, guess=40)
"""For a tiny model on a CPU."""


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One run of the matrix. `load`: a share of capacity; None: the run that measures it."""

    work: str
    load: float | None
    policy: str
    repeat: int = 0

    @property
    def name(self) -> str:
        load = CAPACITY if self.load is None else f"{self.load:g}"
        return "~".join([self.work, load, self.policy, str(self.repeat)])

    @classmethod
    def parse(cls, name: str) -> Cell:
        """From its name. Raises SpecError."""
        try:
            work, load, policy, repeat = name.split("~")
            return cls(work, None if load == CAPACITY else float(load), policy, int(repeat))
        except ValueError:
            raise SpecError(f"{name} is no cell's name: it should read WORK~LOAD~POLICY~REPEAT") from None


def works(max_model_len: int, starved_blocks: int, traces: Mapping[str, str] | None = None) -> dict[str, Work]:
    """The workloads. `traces`: name -> file, in place of the generator that is fitted to it.

    Prompts are cut to what `max_model_len` leaves beside outputs. `starved_blocks`: KV blocks of the
    memory-starved one.
    """
    common = {"max_model_len": max_model_len, "declared_sigma": 0.5, "slo": SLOS, "tenants": TENANTS}
    swap = {"swap": {"preemption": "last_admitted,mode=swap"}, "cheapest": {"preemption": "cheapest"}}
    found = {
        "chat": Work({"name": "chat", **common, "arrivals": "poisson"}),
        "code": Work({"name": "code", **common, "arrivals": "poisson"}, at_most=64),
        # Blocks of 512 tokens become 64; turns are 134 s apart in the middle, and become 5 at 30 req/s.
        "prefix": Work(
            {"name": "prefix-chat", **common, "length_scale": 0.125},
            {"prefix_caching": True},
            drawn_at=1.2,
            at_once=False,
            pace=1.5,
        ),
        "starved": Work(
            {"name": "chat", **common, "seed": 1, "arrivals": "poisson"},
            {"num_blocks": starved_blocks},
            pace=0.45,
            at_most=40,
            policies=swap,
        ),
        "sharegpt": Work({"name": "sharegpt", **common, "arrivals": "poisson"}, pace=0.45),
        "bursts": Work({"name": "chat", **common, "seed": 2, "arrivals": "gamma", "cv": 3.0}),
    }
    for name, file in (traces or {}).items():
        if name not in found:
            raise SpecError(f"there is no workload {name!r} in the matrix; it has {', '.join(found)}")
        work = found[name]
        found[name] = replace(work, workload={**work.workload, "name": file}, at_once=True)
    return found


def arrivals_at(rate: float, fields: Mapping[str, Any], work: Work) -> dict[str, float]:
    """Arrivals at exactly this rate from the first to the last: always drawn alike, then moved together or apart."""
    drawn = make_workload(WorkloadSpec.model_validate({**fields, "rate": work.drawn_at}))
    return {"rate": work.drawn_at, "time_scale": drawn.rate / rate}


def ordered(works: Mapping[str, Work], repeats: int = 3) -> Iterator[Cell]:
    """All cells, each workload's capacity before its loads, so that wherever time ends the most is known: how far one
    workload is off and where it misses its objectives; the others; the noise; policies; then what is left."""
    usual, first = next(iter(POLICIES)), next(iter(works))
    wanted = [Cell(first, load, usual) for load in (None, *LADDER[:4])]
    for work in works:
        if work != LAST:
            wanted += [Cell(work, load, usual) for load in (None, USUAL)]
    wanted += [Cell(first, BUSY, usual), *(Cell(first, load, usual, 1) for load in (BUSY, USUAL))]
    wanted += [Cell(first, BUSY, policy) for policy in POLICIES]
    wanted += [Cell(work, USUAL, policy) for work in works for policy in works[work].policies]
    wanted += [Cell(first, load, usual) for load in LADDER]
    below_first = sorted(LADDER, key=lambda load: load > 1)  # targets are for what a replica can take
    wanted += [Cell(work, load, usual) for load in (None, *below_first) for work in works]
    wanted += [Cell(work, USUAL, usual, 1) for work in works]
    wanted += [Cell(first, LOADS[-1], policy) for policy in POLICIES]
    wanted += [Cell(work, BUSY, policy) for work in works for policy in POLICIES]
    wanted += [Cell(first, load, policy) for load in LOADS for policy in POLICIES]
    for repeat in range(repeats):
        wanted += [
            Cell(work, load, policy, repeat)
            for load in LOADS
            for work in works
            for policy in (*POLICIES, *works[work].policies)
        ]
    return iter(dict.fromkeys(wanted))
