from __future__ import annotations

from policies.program_queue import Program, ProgramQueue
from policies.registry import register
from policies.request import Request


@register("queue", "atlas")
class Atlas(ProgramQueue):
    """Least attained critical path (Agentix): as `plas`, where of calls side by side only the longest path counts.

    A call's path is the time it was served and the longest path of its `parents`; a program's is the longest of its
    ended calls. A call comes with the longest path of the parents it names; one that names none, or only such as have
    not ended or are forgotten, with its program's. The knobs are those of `plas`; `remember` bounds programs and ended
    calls, each.

    Where this departs: the paper keeps one number a program, which only calls without parents get here; with parents, a
    short branch is not taken for a long one. Else as `plas`; of a chain of calls it is `plas`.
    O(log n + parents) an event.
    Source: Luo et al., "Agentix" (before: "Autellix"), NSDI 2026, arXiv 2502.13965, algorithm 1.
    """

    def __init__(
        self,
        quantum_ms: float = 500.0,
        factor: float = 2.0,
        levels: int = 8,
        beta: float = 10.0,
        demote: bool = True,
        remember: int = 10_000,
    ) -> None:
        super().__init__(quantum_ms, factor, levels, beta, demote, remember)
        self._paths: dict[int, int] = {}  # ended calls, the one that ended longest ago first

    def start(self, request: Request, program: Program) -> int:
        return max((self._paths[p] for p in request.parents if p in self._paths), default=program.service)

    def charge(self, request: Request, program: Program, start: int, time: int) -> None:
        self._paths[request.id] = start + time
        if len(self._paths) > self._remember:
            del self._paths[next(iter(self._paths))]
        program.service = max(program.service, start + time)
