from __future__ import annotations

from policies.program_queue import Program, ProgramQueue
from policies.registry import register
from policies.request import Request


@register("queue", "plas")
class Plas(ProgramQueue):
    """Program-level attained service (Agentix): calls of programs served least so far go first; for `preemptive`.

    A call comes with its program's service, the sum of the times that its ended calls were served (the durations of
    their steps, over all admissions, in nanoseconds). Levels, quanta and starvation: `policies.program_queue`, with
    `quantum_ms`, `factor`, `levels`, `beta`, `demote`, `remember`; their defaults are ours.

    A program is charged when a call ends; a running call, by its quanta, sinks as it is served.
    Of the paper's figure 2 (sum of waits: FCFS 18, PLAS 12 as published) this makes 14, with and without quanta of one
    unit of time, and 13 with quanta of two. 12 comes out where a program is charged at once for what runs and whoever
    runs goes on at equal service, which is not first come, first served within a level.
    Where this departs: the paper's algorithm keeps max(service, call's start + its time), which of calls side by side
    counts one; here PLAS is their sum, as it is defined, and `atlas` is the longest path. Cancelled calls are charged,
    too. Of what a promoted call waited and was served, its program's W and T get only what came after. Nobody is
    swapped: a stopped call keeps its blocks or is computed again, as `preemptive` says. To decide every N steps, put
    `every` around it.
    O(log n) an event.
    Source: Luo et al., "Agentix" (before: "Autellix"), NSDI 2026, arXiv 2502.13965, algorithm 1.
    """

    def start(self, request: Request, program: Program) -> int:
        return program.service

    def charge(self, request: Request, program: Program, start: int, time: int) -> None:
        program.service += time
