"""A workload as a specification: which trace or generator, how much of it, and how it is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from experiments.workloads.closed_loop import by_turns, with_root_arrivals
from experiments.workloads.generators import arrivals, named, programs, streams
from experiments.workloads.generators.prefix_chat import prefix_chat
from experiments.workloads.generators.processes import Process, Size, draw_times
from experiments.workloads.loaders import load
from experiments.workloads.request import Workload
from policies.registry import nearest
from policies.request import Slo

GENERATORS = (
    *("chat", "code", "sharegpt", "prefix-chat", "multi-tenant", "reasoning", "sessions", "agents"),
    *("fixed", "uniform"),
)
OWN_ARRIVALS = ("prefix-chat", "sessions", "agents")
"""Generators whose programs start by a process of their own."""


def _no_flag(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"Input should be a valid number, not {value}")
    return value


Number = Annotated[float, BeforeValidator(_no_flag)]
Positive = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
SequenceLength = Annotated[int, Field(strict=True, ge=2, le=2**31 - 1)]
Seed = Annotated[int, Field(strict=True, ge=0)]


class SloClass(BaseModel):
    """A class of requests with the same latency objectives.

    Attributes:
        share: of the requests, in proportion to the other classes' shares.
        ttft_ms, tpot_ms, e2e_ms: objectives; None: there is none of the kind.
        value: what meeting them is worth, for policies that weigh.
        droppable: a policy may shed a request of it once they cannot be met.
        priority: of the class's requests, lower goes first; None: as they have it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: Positive = 1.0
    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None
    e2e_ms: Positive | None = None
    value: Positive = 1.0
    droppable: bool = False
    priority: Annotated[int, Field(strict=True, ge=-(2**31), lt=2**31)] | None = None

    @property
    def slo(self) -> Slo | None:
        """The objectives, or None where the class has none."""
        ttft, tpot, e2e = (None if ms is None else round(1e6 * ms) for ms in (self.ttft_ms, self.tpot_ms, self.e2e_ms))
        return None if ttft is tpot is e2e is None else Slo(ttft, tpot, e2e, self.value, self.droppable)


class WorkloadSpec(BaseModel):
    """What to run. Unknown fields, NaN, infinities and numbers out of range are refused by name.

    Attributes:
        name: a generator (see `generators.named`) or the path of a trace file.
        format: of the trace file; "auto" finds it. See `loaders.FORMATS`.
        block_size: tokens of a prefix block of the trace, when the data should not decide.
        n: requests. With a trace: the first n.
        duration_s: seconds of arrivals. With both, whichever ends first.
        rate: mean req/s, from one in twelve days to a million. A generator sends more users; a trace with its
            recorded arrivals is replayed faster or slower as a whole; a trace without arrivals becomes Poisson.
        arrivals: "default" keeps the generator's process or the trace's times; else new times of a process.
        cv: coefficient of variation of the gaps, for `arrivals: gamma`.
        seed: of everything random.
        time_scale: multiplies arrival times, after everything else about arrivals.
        length_scale: multiplies lengths (prefix blocks with them).
        max_input, max_output: cut longer prompts and outputs.
        max_model_len: cut what does not fit the context, by the rule of `Workload.clip`.
        cap: max_tokens of the requests, see `Workload.with_cap`. None: as the file has it; where it has
            none, and for generators, the largest output of the whole workload, for everyone.
        tenants: a number of tenants with equal shares, or name -> weight; assigned at random.
        slo: latency objectives: one class for all requests, or a list of classes with shares, assigned at random.
        declared_sigma: give policies a length hint with this lognormal error (0: exact).
        prompt_tokens, output_tokens: for `fixed` (512 and 128).
        low, high: for `uniform` (100 and 1024).
        turns: calls or turns of a program that follow each other, on average, for `sessions` and `agents`.
        think_s: mean seconds that a user thinks, or a tool takes, for `sessions` and `agents`; with `closed` think
            times are drawn with this mean instead of taken from the trace.
        timeout_s: seconds after which a client that has no whole answer gives up, and its request is cancelled.
        retries: how often it then tries again, at once.
        closed: a trace's sessions as closed loops: each turn comes its think time after the end of the one before.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1)]
    format: str = "auto"
    block_size: Count | None = None
    n: Count | None = None
    duration_s: Positive | None = None
    rate: Annotated[Number, Field(ge=1e-6, le=1e6, allow_inf_nan=False)] | None = None
    arrivals: Process | Literal["default"] = "default"
    cv: Positive | None = None
    seed: Seed = 0
    time_scale: Positive = 1.0
    length_scale: Positive = 1.0
    max_input: Count | None = None
    max_output: Count | None = None
    max_model_len: SequenceLength | None = None
    cap: Count | Literal["largest", "exact"] | None = None
    tenants: Count | Annotated[dict[str, Positive], Field(min_length=1)] | None = None
    slo: SloClass | Annotated[tuple[SloClass, ...], Field(min_length=1)] | None = None
    declared_sigma: Annotated[Number, Field(ge=0, allow_inf_nan=False)] | None = None
    prompt_tokens: Count | None = None
    output_tokens: Count | None = None
    low: Count | None = None
    high: Count | None = None
    turns: Annotated[Number, Field(ge=1, le=1000)] | None = None
    think_s: Positive | None = None
    closed: bool = False
    timeout_s: Positive | None = None
    retries: Annotated[int, Field(strict=True, ge=0, le=100)] = 0

    @model_validator(mode="after")
    def _fields_that_apply(self) -> WorkloadSpec:
        only = {
            "fixed": ("prompt_tokens", "output_tokens"),
            "uniform": ("low", "high"),
        }
        for generator, fields in only.items():
            for field in fields:
                if self.name != generator and getattr(self, field) is not None:
                    raise ValueError(f"{field} is only for the workload {generator!r}, not {self.name!r}")
        if self.cv is not None and self.arrivals != "gamma":
            raise ValueError("cv is only for arrivals 'gamma'; set arrivals: gamma")
        if self.arrivals == "gamma" and self.cv is None:
            raise ValueError("arrivals 'gamma' need cv (1 is Poisson)")
        if self.arrivals == "at-once" and self.rate is not None:
            raise ValueError("rate has no meaning with arrivals 'at-once'; leave one out")
        if self.name == "uniform" and (self.low or 100) > (self.high or 1024):
            raise ValueError(f"low {self.low or 100} is above high {self.high or 1024}")
        if self.is_generator and self.n is None and self.duration_s is None:
            raise ValueError(f"give n (requests) or duration_s (seconds) for the generator {self.name!r}")
        if self.is_generator and (self.format != "auto" or self.block_size is not None):
            raise ValueError(f"format and block_size are for trace files; {self.name!r} is a generator")
        if self.name in OWN_ARRIVALS and self.arrivals != "default":
            raise ValueError(f"{self.name} has arrivals of its own, by session; leave arrivals out")
        if self.turns is not None and self.name not in ("sessions", "agents"):
            raise ValueError(f"turns is only for the workloads 'sessions' and 'agents', not {self.name!r}")
        if self.think_s is not None and self.name not in ("sessions", "agents") and not self.closed:
            raise ValueError("think_s is for the workloads 'sessions' and 'agents', and for traces with closed: true")
        if self.retries and self.timeout_s is None:
            raise ValueError("retries are those of clients that give up; say after how long: timeout_s")
        if self.closed and self.is_generator:
            raise ValueError(f"closed is for trace files; of generators 'sessions' and 'agents' are, not {self.name!r}")
        return self

    @property
    def is_generator(self) -> bool:
        """Is `name` a generator rather than a file?"""
        return self.name in GENERATORS


def make_workload(spec: WorkloadSpec) -> Workload:
    """The workload that `spec` describes: the same for the same spec and file, always.

    Raises:
        TraceError: the trace file cannot be used.
        ValueError: the parts do not fit together, in one line.
    """
    workload = _generate(spec) if spec.is_generator else _from_trace(spec)
    if spec.length_scale != 1.0:
        workload = workload.scale_lengths(spec.length_scale)
    if spec.max_input is not None:
        workload = workload.cut_prompts(spec.max_input)
    if spec.max_output is not None:
        workload = workload.cut_outputs(spec.max_output)
    if spec.time_scale != 1.0:
        workload = workload.scale_time(spec.time_scale)
    if spec.tenants is not None:
        workload = _with_tenants(workload, spec.tenants, spec.seed)
    if spec.slo is not None:
        workload = _with_slos(workload, spec.slo if isinstance(spec.slo, tuple) else (spec.slo,), spec.seed)
    if spec.cap is not None:
        workload = workload.with_cap(spec.cap)
    if spec.max_model_len is not None:
        workload = workload.clip(spec.max_model_len)  # after the cap: it lowers caps to what fits
    if spec.declared_sigma is not None:
        workload = workload.with_declared_output(spec.declared_sigma, spec.seed)
    return workload


def _generate(spec: WorkloadSpec) -> Workload:
    size = Size(spec.n, spec.duration_s, spec.rate, spec.seed)
    process: Process | None = None if spec.arrivals == "default" else spec.arrivals
    if spec.name == "prefix-chat":
        made = prefix_chat(size)
    elif spec.name == "sessions":
        made = programs.sessions(size, spec.turns, spec.think_s)
    elif spec.name == "agents":
        made = programs.agents(size, spec.turns, spec.think_s)
    elif spec.name == "fixed":
        made = named.fixed(size, spec.prompt_tokens or 512, spec.output_tokens or 128, process, spec.cv)
    elif spec.name == "uniform":
        made = named.uniform(size, spec.low or 100, spec.high or 1024, process, spec.cv)
    elif spec.name == "reasoning":
        made = named.reasoning(size, process, spec.cv)
    else:
        makers = {
            "chat": named.chat,
            "code": named.code,
            "sharegpt": named.sharegpt,
            "multi-tenant": named.multi_tenant,
        }
        make = makers[spec.name]
        made = make(size) if process is None else make(size, process, spec.cv)
    fields = {"n", "duration_s", "rate", "arrivals", "cv", "prompt_tokens", "output_tokens", "low", "high"}
    fields |= {"turns", "think_s"}
    parameters = spec.model_dump(include=fields, exclude_none=True)
    source = {"source": f"generator:{spec.name}", "seed": spec.seed, "parameters": parameters, "steps": []}
    return made.replace(provenance=source)


def _from_trace(spec: WorkloadSpec) -> Workload:
    if not Path(spec.name).is_file():
        near = nearest(spec.name, list(GENERATORS))
        raise ValueError(f"{spec.name!r} is neither a file nor a generator; {near}known: {', '.join(GENERATORS)}")
    workload = load(Path(spec.name), spec.format, block_size=spec.block_size)
    if spec.closed:
        workload = by_turns(workload, spec.think_s, spec.seed)
    if spec.n is not None:
        workload = workload.slice(spec.n)
    workload = _retimed(workload, spec)
    if spec.duration_s is not None:
        within = int((workload.arrival_ns < spec.duration_s * 1e9).sum())
        if not within:
            raise ValueError(f"{spec.name}: no request arrives within {spec.duration_s} s; ask for longer")
        workload = workload.slice(within)
    return workload


def _retimed(workload: Workload, spec: WorkloadSpec) -> Workload:
    """The trace at the arrivals that `spec` asks for; of a closed loop those that follow nobody."""
    first = np.array([not of for of in workload.parents]) if workload.parents is not None else slice(None)
    firsts = workload.arrival_ns[first]
    timed = bool(firsts[-1] > firsts[0])
    process = spec.arrivals
    if process == "default":
        if spec.rate is None:
            return workload
        if timed:
            return workload.scale_rate(spec.rate)
        process = "poisson"
    rate = spec.rate
    if rate is None and timed and process != "at-once":
        rate = workload.rate  # new gaps at the trace's own pace
    parameters = {"process": process, "rate": rate, "cv": spec.cv, "seed": spec.seed}
    if workload.parents is not None:
        share = len(firsts) / len(workload)  # the rate is that of all requests
        size = Size(len(firsts), None, None if rate is None else rate * share, spec.seed)
        retimed = with_root_arrivals(workload, arrivals.to_ns(draw_times(process, size, spec.cv)))
        return retimed.note("new_arrivals", **parameters)
    times = draw_times(process, Size(len(workload), None, rate, spec.seed), spec.cv)
    return workload.with_arrivals(times, "new_arrivals", **parameters)


def _with_tenants(workload: Workload, tenants: int | dict[str, float], seed: int) -> Workload:
    shares = {f"tenant-{k}": 1.0 for k in range(tenants)} if isinstance(tenants, int) else tenants
    return named.assign_tenants(workload, shares, seed).note("tenants", shares=shares, seed=seed)


def _with_slos(workload: Workload, classes: tuple[SloClass, ...], seed: int) -> Workload:
    shares = np.array([one.share for one in classes])
    chosen = streams.stream(seed, "slo").choice(len(classes), size=len(workload), p=shares / shares.sum())
    changed = workload.replace(slo=[classes[k].slo for k in chosen.tolist()])
    if any(one.priority is not None for one in classes):
        before = np.zeros(len(workload), np.int64) if workload.priority is None else workload.priority
        new = np.array([np.nan if one.priority is None else one.priority for one in classes])[chosen]
        changed = changed.replace(priority=np.where(np.isnan(new), before, new).astype(np.int64))
    return changed.note("slo", classes=[one.model_dump(mode="json", exclude_none=True) for one in classes], seed=seed)
