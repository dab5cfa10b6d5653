"""One request's life in a run: what it did when, and why it waited, from the records alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from experiments.records import Run, RunError
from experiments.token_times import MOVE

WAITING, PREFILL, DECODE, PAUSED, MOVING = "waiting", "prefill", "decode", "paused", "moving"
PHASES = (WAITING, PREFILL, DECODE, PAUSED, MOVING)

_WORDS = {
    "no blocks": "there were not enough free KV blocks for it",
    "token budget": "the step's token budget was used up",
    "slots": "all places for running requests were taken",
    "admission": "the admission policy did not promise it memory",
    "in flight": "a step in flight still computed for it",
}


@dataclass(frozen=True, slots=True)
class Span:
    """A time in which a request did one thing (one of PHASES), in nanoseconds since the run began, on a replica."""

    phase: str
    begin_ns: int
    end_ns: int
    replica: int = 0


@dataclass(frozen=True, slots=True)
class Wait:
    """A part of its waiting, and why, in words. `behind`: the request that it stood behind, if that is why."""

    begin_ns: int
    end_ns: int
    why: str
    behind: int | None = None


@dataclass(frozen=True)
class Life:
    """What became of a request.

    Attributes:
        spans: one after another, from its arrival to its end.
        waits: why it waited, in order; empty where decisions were not recorded.
        status: as in the records.
    """

    request_id: int
    arrival_ns: int
    first_token_ns: int | None
    finish_ns: int | None
    status: str
    prompt_tokens: int
    output_tokens: int
    spans: tuple[Span, ...]
    waits: tuple[Wait, ...]

    def total_ns(self, phase: str) -> int:
        """Time spent in a phase."""
        return sum(span.end_ns - span.begin_ns for span in self.spans if span.phase == phase)

    def lanes(self, label: str) -> dict[int, str]:
        """What to call each replica that it was on, in order; with one it is the run's label."""
        replicas = list(dict.fromkeys(span.replica for span in self.spans))
        return {r: f"{label}, replica {r}" if len(replicas) > 1 else label for r in replicas}

    @property
    def first_token_replica(self) -> int | None:
        """Where it got its first token."""
        at = self.first_token_ns
        return None if at is None else next((s.replica for s in self.spans if s.begin_ns < at <= s.end_ns), None)

    def sentences(self) -> list[str]:
        """Why it waited and for how long, longest first; waits for one reason are added up, whoever it stood behind."""
        total: dict[str, int] = {}
        others: dict[str, dict[int, int]] = {}
        for wait in self.waits:
            lasted = wait.end_ns - wait.begin_ns
            total[wait.why] = total.get(wait.why, 0) + lasted
            if wait.behind is not None:
                behind = others.setdefault(wait.why, {})
                behind[wait.behind] = behind.get(wait.behind, 0) + lasted
        order = sorted(total, key=lambda why: -total[why])
        return [f"{total[why] / 1e6:,.1f} ms: {_in_words(why, others.get(why, {}))}" for why in order]


def _in_words(why: str, behind: dict[int, int]) -> str:
    if not behind:
        return why
    if len(behind) == 1:
        return f"it stood behind request {next(iter(behind))}, which was passed over, as {why}"
    longest = max(behind, key=lambda other: behind[other])
    return (
        f"it stood behind {len(behind)} others, one after the other, which were passed over, as {why} "
        f"(longest behind request {longest}: {behind[longest] / 1e6:,.1f} ms)"
    )


def request_life(run: Run, request_id: int) -> Life:
    """Follow a request. Raises RunError where the run does not know it, or has no steps."""
    found = run.requests[run.requests["request_id"] == request_id]
    if not len(found):
        raise RunError(f"{run.name} has no request {request_id}")
    row = found.iloc[0]
    finish = None if pd.isna(row["finish_ns"]) else int(row["finish_ns"])
    end = finish if finish is not None else int(run.steps["end_ns"].max()) if len(run.steps) else int(row["arrival_ns"])
    arrival = int(row["arrival_ns"])
    first = None if pd.isna(row["first_token_ns"]) else int(row["first_token_ns"])
    waits: list[Wait] = []
    spans: list[Span] = []
    since = arrival
    for stay in _stays(run, row):
        steps = run.steps.loc[run.steps["replica"] == stay.replica, ["step", "plan_ns", "end_ns"]].set_index("step")
        until = end if stay.left is None else min(max(since, _left_ns(steps, stay.left, run)), end)
        if not run.has_decisions:
            rough = [_cut(s, since, until, stay.replica) for s in _rough_spans(row, arrival, end)]
            spans += rough
            since = until
            continue
        here = run.decisions[run.decisions["replica"] == stay.replica]
        own = here[(here["request_id"] == request_id) & (here["step"] >= stay.came)]
        own = own if stay.left is None else own[own["step"] < stay.left]
        phase = MOVING if spans else WAITING
        here_spans = [replace(s, replica=stay.replica) for s in _spans(own, steps, phase, since, first or 0, until)]
        blocked = _Blocked(here, steps)
        for span in here_spans:
            if span.phase == WAITING:
                waits += blocked.explain(request_id, span, stay.came if span.begin_ns == arrival else None)
        spans += here_spans
        since = until
    return Life(
        request_id=request_id,
        arrival_ns=arrival,
        first_token_ns=first,
        finish_ns=finish,
        status=str(row["status"]),
        prompt_tokens=int(row["prompt_tokens"]),
        output_tokens=int(row["output_tokens"]),
        spans=tuple(span for span in spans if span.end_ns > span.begin_ns),
        waits=tuple(wait for wait in waits if wait.end_ns > wait.begin_ns),
    )


@dataclass(frozen=True, slots=True)
class _Stay:
    """On a replica, from before the plan `came` to before the plan `left`; None: to the end."""

    replica: int
    came: int
    left: int | None


def _stays(run: Run, row: pd.Series) -> list[_Stay]:
    moves = np.asarray(row["moves"], np.int64).reshape(-1, MOVE)
    earlier = [_Stay(int(replica), int(came), int(left)) for replica, came, left in moves[:, :3]]
    # A request that has not come to a plan of its last replica has -1 there.
    return [*earlier, _Stay(int(row["replica"]), max(0, int(row["before_step"])), None)]


def _left_ns(steps: pd.DataFrame, left: int, run: Run) -> int:
    """It leaves with the report of the last step that was known before the plan `left`."""
    known = steps.loc[steps.index < left - int(run.limits.get("lag", 0)), "end_ns"]
    return int(known.iloc[-1]) if len(known) else 0


def _cut(span: Span, begin: int, end: int, replica: int) -> Span:
    """The part of a span in a stay."""
    return Span(span.phase, min(max(span.begin_ns, begin), end), min(max(span.end_ns, begin), end), replica)


def _spans(
    decisions: pd.DataFrame, steps: pd.DataFrame, phase: str, since: int, first_token: int, end: int
) -> Iterator[Span]:
    """From what was decided about it: it waits until it is admitted, computes its prompt, then decodes."""
    last_chunk = -1
    touched = steps[steps.index.isin(decisions["step"])]
    plan_ns, end_ns = touched["plan_ns"].to_dict(), touched["end_ns"].to_dict()
    for step, kind, reason in zip(*(decisions[c].tolist() for c in ("step", "kind", "reason")), strict=True):
        planned = plan_ns.get(step, end)
        following: str | None = None
        if kind == "chunk":
            last_chunk = step
        if kind in ("admit", "chunk"):
            following = PREFILL
        elif kind in ("join", "decode", "resume"):
            following = DECODE
        elif kind == "preempt":
            following = PAUSED if reason == "keep" else WAITING
        if following is None or following == phase:
            continue
        # A prefill that is followed by decodes lasts until its last chunk is through, whenever those were planned, and
        # the first one until there is a token: the last of the prompt may have been computed with the decodes.
        at = planned
        if phase == PREFILL and following == DECODE:
            at = max(end_ns.get(last_chunk, planned), first_token if first_token > since else 0)
        until = min(max(int(at), since), end)
        yield Span(phase, since, until)
        phase, since = following, until
    yield Span(phase, since, max(end, since))


def _rough_spans(row: pd.Series, arrival: int, end: int) -> Iterator[Span]:
    """Without decisions: its first plan and its first token."""
    scheduled = end if pd.isna(row["first_scheduled_ns"]) else int(row["first_scheduled_ns"])
    first = end if pd.isna(row["first_token_ns"]) else int(row["first_token_ns"])
    yield Span(WAITING, arrival, scheduled)
    yield Span(PREFILL, scheduled, first)
    yield Span(DECODE, first, end)


class _Blocked:
    """Who was looked at and passed over when: a row holds until that request runs, or another one is passed over."""

    def __init__(self, decisions: pd.DataFrame, steps: pd.DataFrame) -> None:
        rows = decisions[decisions["kind"] == "blocked"]
        self._steps = rows["step"].to_numpy()
        self._requests, self._reasons = rows["request_id"].to_numpy(), rows["reason"].tolist()
        started = decisions[decisions["kind"].isin(["admit", "resume", "drop"])]
        self._started = started["request_id"].to_numpy(), started["step"].to_numpy()
        self._starts: dict[int, np.ndarray] = {}
        self._index, self._plan_ns = steps.index.to_numpy(), steps["plan_ns"].to_numpy()

    def explain(self, request_id: int, span: Span, before_step: int | None) -> list[Wait]:
        """A waiting span, cut where the reason changes."""
        first = int(np.searchsorted(self._plan_ns, span.begin_ns, side="left"))
        if before_step is not None:
            first = int(np.searchsorted(self._index, before_step))
        last = int(np.searchsorted(self._plan_ns, span.end_ns, side="left"))
        waits: list[Wait] = []
        since = span.begin_ns
        if first < len(self._plan_ns) and self._plan_ns[first] > span.begin_ns:
            since = min(int(self._plan_ns[first]), span.end_ns)
            waits.append(Wait(span.begin_ns, since, "the next plan was not due: a step was running"))
        if first >= last:
            return waits
        from_step, to_step = int(self._index[first]), int(self._index[last - 1])
        cuts = [from_step, *self._steps[(self._steps > from_step) & (self._steps <= to_step)].tolist()]
        for at, step in enumerate(cuts):
            until_step = cuts[at + 1] if at + 1 < len(cuts) else None
            until = span.end_ns if until_step is None else self._time(until_step)
            until = min(max(until, since), span.end_ns)
            why, behind = self._why(request_id, step)
            if waits and (waits[-1].why, waits[-1].behind) == (why, behind):
                since = waits.pop().begin_ns
            waits.append(Wait(since, until, why, behind))
            since = until
        return waits

    def _time(self, step: int) -> int:
        return int(self._plan_ns[np.searchsorted(self._index, step)])

    def _starts_of(self, request_id: int) -> np.ndarray:
        """The steps in which it was let in, resumed or dropped: from then on it stood before nobody."""
        if request_id not in self._starts:
            requests, steps = self._started
            self._starts[request_id] = steps[requests == request_id]
        return self._starts[request_id]

    def _why(self, request_id: int, step: int) -> tuple[str, int | None]:
        end = int(np.searchsorted(self._steps, step, side="right"))
        behind: tuple[int, str] | None = None
        for at in range(end - 1, max(-1, end - 33), -1):
            other, reason = int(self._requests[at]), self._reasons[at]
            started = self._starts_of(other)
            if np.any((started > self._steps[at]) & (started <= step)):
                continue
            if other == request_id:
                return f"it was looked at and passed over, as {_WORDS.get(reason, reason)}", None
            behind = behind or (other, reason)
        if behind is None:
            return "the policy did not look at it: others went before it", None
        return _WORDS.get(behind[1], behind[1]).replace("for it", "for that one"), behind[0]
