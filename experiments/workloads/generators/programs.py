"""Closed loops without data: chat sessions with think times, and agents that call tools, some of them side by side.

Both are programs that start by a Poisson process; what comes later in one comes after the end of what it follows, see
`closed_loop`. `rate` counts requests as if nothing took any time but thinking and tools.

`sessions`: a conversation of `turns` turns on average (3.5; geometric), between them a think time (exponential, mean
`think_s`, 10). First messages and answers are as long as those of the Azure 2023 conversation trace; a later prompt has
all that was said before, and a message of 30 tokens at the median.

`agents`: a chain of `turns` calls on average (5; geometric). Each but the last asks for one of four tools, which takes
its time (lognormal around its mean below, all scaled so that `think_s`, 2, is the mean of all tools), and whose answer
of 250 tokens at the median comes on top of the context. One call in four asks for two to four subagents instead, calls
that run side by side and are put together by the next one. First prompts have 1,300 tokens at the median and outputs
95, as mini-swe-agent's on SWE-bench (LMCache's agent traces); the other figures are round ones of ours. Numbers of
tools: 0 to 3, 4 for subagents, 5 of a subagent's call, which waits for its siblings.

Every prompt shares the blocks of the one that it goes on from, and all of a workload a system prompt of 1,024 tokens
for agents. Blocks that an answer fills are found by nobody, as in traces with `hash_ids`: real answers are other texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from experiments.workloads.generators import arrivals
from experiments.workloads.generators.lengths import TABLES
from experiments.workloads.generators.processes import Size
from experiments.workloads.generators.streams import stream
from experiments.workloads.request import Workload

BLOCK = 16
SYSTEM_TOKENS = 1024
LONGEST_PROMPT = 32_000
SESSION_RATE, SESSION_TURNS, SESSION_THINK_S = 2.0, 3.5, 10.0
AGENT_RATE, AGENT_TURNS, AGENT_TOOL_S = 2.0, 5.0, 2.0
FORK = 0.25
TOOL_MEANS_S = (0.2, 1.0, 2.0, 4.8)
"""Of a file read, a search, a test run, a web page. Their mean is 2."""
SUBAGENTS = len(TOOL_MEANS_S)
SIBLINGS = SUBAGENTS + 1


@dataclass(slots=True)
class Call:
    """A call of a program. `parents` and `context` (whose prompt its own begins with) are places in the program."""

    at_s: float
    prompt: int
    output: int
    parents: tuple[int, ...] = ()
    context: int | None = None
    gap_s: float = 0.0
    tool: int = -1


@dataclass(slots=True)
class Script:
    """A program's calls, as they are drawn."""

    calls: list[Call] = field(default_factory=list)

    def add(self, prompt: float, output: float, parents: tuple[int, ...], context: int | None, gap_s: float) -> int:
        """Another call, `gap_s` after its parents. Returns its place."""
        at = max((self.calls[p].at_s for p in parents), default=0.0) + gap_s
        tokens = max(1, min(round(prompt), LONGEST_PROMPT))
        self.calls.append(Call(at, tokens, max(1, round(output)), parents, context, gap_s))
        return len(self.calls) - 1


def sessions(size: Size, turns: float | None = None, think_s: float | None = None) -> Workload:
    """Conversations with think times."""
    turns, think_s = turns or SESSION_TURNS, think_s or SESSION_THINK_S

    def script(number: int) -> Script:
        rng = stream(size.seed, "session", number)
        prompts, outputs = TABLES["azure_conv"]
        made = Script()
        last = made.add(float(prompts.at(rng.random())), float(outputs.at(rng.random())), (), None, 0.0)
        while rng.random() >= 1 / turns:
            before = made.calls[last]
            prompt = before.prompt + before.output + rng.lognormal(np.log(30), 1.0)
            output = float(outputs.at(rng.random()))
            last = made.add(prompt, output, (last,), last, rng.exponential(think_s))
        return made

    return _workload("sessions", size, SESSION_RATE, turns, script)


def agents(size: Size, turns: float | None = None, tool_s: float | None = None) -> Workload:
    """Programs of calls with tools and subagents between them."""
    turns, scale = turns or AGENT_TURNS, (tool_s or AGENT_TOOL_S) / AGENT_TOOL_S

    def script(number: int) -> Script:
        rng = stream(size.seed, "agent", number)
        made = Script()

        def output() -> float:
            return rng.lognormal(np.log(95), 0.6)

        def answer() -> float:
            return rng.lognormal(np.log(250), 1.0)

        last = made.add(SYSTEM_TOKENS + rng.lognormal(np.log(276), 1.0), output(), (), None, 0.0)
        while rng.random() >= 1 / turns:
            before = made.calls[last]
            said = before.prompt + before.output
            if rng.random() < FORK:
                before.tool = SUBAGENTS
                width = int(rng.integers(2, 5))
                branches = tuple(made.add(said + answer() / 4, output(), (last,), last, 0.0) for _ in range(width))
                results = sum(made.calls[branch].output for branch in branches)
                for branch in branches:
                    made.calls[branch].tool = SIBLINGS
                last = made.add(said + results, output(), branches, last, 0.0)
                continue
            before.tool = int(rng.integers(0, SUBAGENTS))
            took = scale * TOOL_MEANS_S[before.tool] * rng.lognormal(-0.5 * 0.8**2, 0.8)
            last = made.add(said + answer(), output(), (last,), last, took)
        return made

    calls = 1 + (turns - 1) * (1 + 3 * FORK)  # three branches on average
    return _workload("agents", size, AGENT_RATE, calls, script, SYSTEM_TOKENS // BLOCK)


def _workload(
    name: str, size: Size, own_rate: float, mean_calls: float, script: Callable[[int], Script], system_blocks: int = 0
) -> Workload:
    """Programs that start so often that there are `rate` requests a second, the first ones of them."""
    rate = size.rate or own_rate
    starts = arrivals.renewal_until(
        lambda n: arrivals.poisson(rate / mean_calls, n, stream(size.seed, "programs")), rate / mean_calls
    )
    rows: list[tuple[float, int, int, Call]] = []  # time, program, place in it

    def make(horizon: float) -> arrivals.Seconds:
        rows.clear()
        for program, start in enumerate(starts(horizon).tolist()):
            calls = script(program).calls
            rows.extend((start + call.at_s, program, place, call) for place, call in enumerate(calls))
        rows.sort(key=lambda row: row[:3])
        del rows[sum(row[0] < horizon for row in rows) :]
        return np.array([row[0] for row in rows])

    times, _ = arrivals.until(make, rate, size.n, size.duration_s)
    del rows[len(times) :]
    place = {(program, k): i for i, (_, program, k, _) in enumerate(rows)}
    parents = [tuple(place[program, p] for p in call.parents) for _, program, _, call in rows]
    followed = {p for of in parents for p in of}
    program = [row[1] for row in rows]
    return Workload.build(
        arrivals.to_ns(times - times[0]),
        [row[3].prompt for row in rows],
        [row[3].output for row in rows],
        session=program,
        program=program,
        parents=parents,
        gap_ns=[round(1e9 * row[3].gap_s) for row in rows],
        tool=[row[3].tool if i in followed else -1 for i, row in enumerate(rows)] if name == "agents" else None,
        hash_ids=_blocks(rows, place, system_blocks),
        hash_block=BLOCK,
        name=name,
    )


def _blocks(
    rows: list[tuple[float, int, int, Call]], place: dict[tuple[int, int], int], system_blocks: int
) -> list[tuple[int, ...]]:
    """Ids of each prompt's full blocks: those of the prompt that it goes on from, and new ones."""
    unused = system_blocks
    ids: list[tuple[int, ...]] = []
    for _, program, _, call in rows:
        old = tuple(range(system_blocks)) if call.context is None else ids[place[program, call.context]]
        old = old[: call.prompt // BLOCK]
        new = call.prompt // BLOCK - len(old)
        ids.append(old + tuple(range(unused, unused + new)))
        unused += new
    return ids
