"""What a run decided, step by step, in a form that two runs can be compared in."""

from __future__ import annotations

from dataclasses import dataclass

from policies.records import REQUESTS, STEPS
from policies.replica_state import Limits
from policies.stack import StackSpec
from tests.policies.harness import Drive, Job


@dataclass(frozen=True)
class Decision:
    """One step: who ran with how many tokens, and who came and went."""

    step: int
    tokens: dict[int, int]
    chunks: list[tuple[int, int, int]]  # (request, start, tokens), in order
    admitted: list[int]
    preempted: list[int]
    wake_at: int | None


def decisions(drive: Drive) -> list[Decision]:
    """Of every call of plan(); the decode group is spelled out."""
    made = []
    for step in drive.steps:
        group = [*drive.running.get(step.index, []), *(r.id for r in step.capped)]
        tokens = dict.fromkeys(group, 1)
        tokens.update((r.id, 1) for r in step.decodes)
        tokens.update((c.request.id, c.num_tokens) for c in step.chunks)
        assert len(tokens) == step.num_decodes + len(step.chunks), "somebody runs twice in one step"
        assert not step.refused, step.refused
        chunks = [(c.request.id, c.start, c.num_tokens) for c in step.chunks]
        admitted = [r.id for r in step.admitted]
        preempted = [r.id for r, _ in step.preempted]
        made.append(Decision(step.index, tokens, chunks, admitted, preempted, step.wake_at))
    return made


def outcomes(drive: Drive) -> list[tuple[object, ...]]:
    """How every request fared, by id."""
    columns = ("request_id", "status", "output_tokens", "cached_tokens", "preemptions", "first_token_ns", "finish_ns")
    rows = [dict(zip(REQUESTS, row, strict=True)) for row in drive.log.requests]
    return sorted(tuple(row[c] for c in columns) for row in rows)


def steps(drive: Drive) -> list[dict]:
    return [dict(zip(STEPS, row, strict=True)) for row in drive.log.steps]


def assert_same_run(limits: Limits, work: list[Job], one: StackSpec, other: StackSpec) -> Drive:
    """Both stacks decide the same in every step. Gives the first run."""
    first, second = Drive(limits, one, work), Drive(limits, other, work, check=False)
    for a, b in zip(decisions(first), decisions(second), strict=False):
        assert a == b
    assert len(first.steps) == len(second.steps)
    assert outcomes(first) == outcomes(second)
    return first
