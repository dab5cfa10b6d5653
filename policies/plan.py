"""What a policy answers (`Plan`), what a panel carries out (`Step`) and what it says afterwards (`Report`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from policies.request import Request, State, found_directly
from policies.shapes import StepShape

FOREVER = (1 << 63) - 1
"""As the time of a pin: until it is lifted."""


class Mode(Enum):
    """How memory is taken from a running request."""

    RECOMPUTE = "recompute"  # its blocks are freed; prompt and output so far are computed again
    SWAP = "swap"  # its blocks move to host memory, and back when it resumes
    KEEP = "keep"  # it stops running and keeps its blocks


found_directly(Mode)


@dataclass(slots=True, init=False)
class Plan:
    """A scheduler's answer for one step. Refer to requests by the objects themselves.

    A waiting request named here has left the scheduler's queue. What the control plane refuses comes back: the
    request is given to `Scheduler.add` again and the refusal stands in the step that the next report carries.
    """

    decode_all: bool
    """Every running request that has exactly one token to compute gets it: the whole decode batch in one word."""
    decodes: list[Request]
    """Single decodes, where not all of them run. Not together with `decode_all`."""
    chunks: list[tuple[Request, int]]
    """(request, tokens): prefill chunks, first ones of waiting requests included, in order."""
    hold: dict[int, int]
    """Request id -> tokens to have blocks for after this step, where that is more than the chunk needs."""
    preempt: list[tuple[Request, Mode]]
    """Running requests; a paused one too, to take back the memory it keeps, and a swapped one, that of the host."""
    resume: list[Request]
    """Paused and swapped requests that run again from this step on."""
    drop: list[tuple[Request, str]]
    """(request, reason): requests that end here without (further) service."""
    pin: list[tuple[Request, int]]
    """(request, until_ns): keep its blocks after it ends; a time that has passed lifts the pin."""
    fetch: list[tuple[Request, str]]
    """(request, "host"): fetch now what a waiting request hits in host memory, as far as there are blocks beside
    everything else in the plan; nobody holds them until it is admitted. (request, "disk"): have what it hits on disk
    read to host memory, as far as that has room."""
    bundles: list[frozenset[int]]
    """Groups of request ids inside `chunks` of which all run or none."""
    wake_at: int | None
    """Ask again at this time even if nothing happens; without effect once no request is alive."""
    repeats: int
    """Steps in which this would be the plan, this one included, as long as nothing comes in from outside and blocks
    suffice, and where somebody waits for slots or blocks, nobody ends: a simulation takes the others without asking.
    Only of a plan that runs every decode and does nothing else but what `chunk_budget` allows."""
    chunk_budget: int
    """Of a plan that `repeats`, tokens of a step: in those that follow it, the one request that prefills gets as many
    as the decodes leave of them, and once it is done decodes are alone. Then this plan may have chunks, and admit. 0:
    there are none."""
    blocked: list[tuple[Request, str]]
    """(request, reason): waiting requests that were looked at and passed over. For the record only."""

    def __init__(
        self,
        decode_all: bool = False,
        decodes: list[Request] | None = None,
        chunks: list[tuple[Request, int]] | None = None,
        hold: dict[int, int] | None = None,
        preempt: list[tuple[Request, Mode]] | None = None,
        resume: list[Request] | None = None,
        drop: list[tuple[Request, str]] | None = None,
        pin: list[tuple[Request, int]] | None = None,
        fetch: list[tuple[Request, str]] | None = None,
        bundles: list[frozenset[int]] | None = None,
        wake_at: int | None = None,
        repeats: int = 1,
        chunk_budget: int = 0,
        blocked: list[tuple[Request, str]] | None = None,
    ) -> None:
        # By hand, as most of it is empty in most steps.
        self.decode_all, self.wake_at, self.repeats, self.chunk_budget = decode_all, wake_at, repeats, chunk_budget
        self.decodes = [] if decodes is None else decodes
        self.chunks = [] if chunks is None else chunks
        self.hold = {} if hold is None else hold
        self.preempt = [] if preempt is None else preempt
        self.resume = [] if resume is None else resume
        self.drop = [] if drop is None else drop
        self.pin = [] if pin is None else pin
        self.fetch = [] if fetch is None else fetch
        self.bundles = [] if bundles is None else bundles
        self.blocked = [] if blocked is None else blocked

    def copy(self) -> Plan:
        """A plan that can be changed without changing this one."""
        return Plan(
            self.decode_all,
            self.decodes[:],
            self.chunks[:],
            self.hold.copy(),
            self.preempt[:],
            self.resume[:],
            self.drop[:],
            self.pin[:],
            self.fetch[:],
            self.bundles[:],
            self.wake_at,
            self.repeats,
            self.chunk_budget,
            self.blocked[:],
        )


class Chunk(NamedTuple):
    """`num_tokens` tokens of a request from position `start` on; `samples` where they reach its last token."""

    request: Request
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """KV blocks on their way: out from the device's to the host's, or in from the host's, one to one. They are those of
    a request that is swapped; `cached`: of a prefix, kept on the host (for nobody yet) or fetched for who hits it."""

    request: Request | None
    out: bool
    device: tuple[int, ...]
    host: tuple[int, ...]
    cached: bool = False


@dataclass(frozen=True, slots=True)
class DiskCopy:
    """A block of a cached prefix on its way between host memory and disk: out to the disk's place, or in from there.

    It begins once all that earlier steps and this one copy to host memory and from it is done, and goes beside the
    steps from then on. `ControlPlane.disk_done` is told its number when it has arrived, or has not."""

    number: int
    out: bool
    disk: int
    host: int
    key: bytes


_NO_WORK = StepShape()


@dataclass(slots=True, init=False)
class Step:
    """A plan as enacted: what a panel has to run. Counts and shapes are those after the plan's preemptions."""

    index: int
    plan_ns: int
    chunks: list[Chunk]
    decodes: list[Request]
    """Single decodes. When `decode_all` is set the decode group runs and this is empty."""
    decode_all: bool
    num_decodes: int
    decode_clock: int
    """Steps, this one included, in which the whole decode group has run."""
    joined: list[Request]
    """Requests that decode with the group from this step on."""
    left: list[Request]
    """Requests that have left the decode group since the last step that ran, before anybody joins for this one."""
    capped: list[Request]
    """Requests that run with the decode group for the last time: their cap is reached."""
    admitted: list[Request]
    resumed: list[Request]
    grown: list[Request]
    """Requests whose block table got longer (or is new) with this step."""
    copies: list[BlockCopy]
    """To be made in this order, after what earlier steps compute and before what this one does. A step that runs
    nothing leaves its copies to the next one that does."""
    disk: list[DiskCopy]
    """Blocks that go between host memory and disk from now on, whether the step runs anything or not."""
    preempted: list[tuple[Request, Mode]]
    dropped: list[tuple[Request, str]]
    refused: list[tuple[Request, str]]
    wake_at: int | None
    shape: StepShape
    filled: list[tuple[Request, int, int]]
    """(request, block index, block id): blocks that generated tokens fill in this step."""

    def __init__(self, index: int, plan_ns: int, wake_at: int | None = None, **others: Any) -> None:
        # By hand: every step makes one, and a dozen calls of factories take three times as long.
        self.index, self.plan_ns, self.wake_at = index, plan_ns, wake_at
        self.decode_all, self.num_decodes, self.decode_clock, self.shape = False, 0, 0, _NO_WORK
        self.chunks, self.decodes, self.joined, self.left, self.capped = [], [], [], [], []
        self.admitted, self.resumed, self.grown, self.copies, self.filled = [], [], [], [], []
        self.disk, self.preempted, self.dropped, self.refused = [], [], [], []
        for name, value in others.items():
            setattr(self, name, value)

    @property
    def runs(self) -> bool:
        """Whether there is anything to compute."""
        return self.num_decodes > 0 or bool(self.chunks)


class CopyTimes(NamedTuple):
    """How long a step's copies took, of each direction for itself, and for how much of that its computation waited."""

    out_ns: int = 0
    in_ns: int = 0
    wait_ns: int = 0


NO_COPIES = CopyTimes()


@dataclass(slots=True)
class Report:
    """What became of a step. Times are nanoseconds since the run began; `end_ns` is when the host knew."""

    step: Step
    launch_ns: int
    end_ns: int
    device_ns: int
    finished: list[tuple[Request, State, int]] = field(default_factory=list)
    """(request, `State.STOPPED` or `State.LENGTH`, output tokens): known from what was sampled."""
    copies: CopyTimes = NO_COPIES
    """For the record."""
