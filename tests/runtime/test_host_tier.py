"""Prefixes that come back from host memory: whatever the schedule, tokens are what they would be with memory ample."""

from __future__ import annotations

import random

import pytest

from policies.contract import View
from policies.plan import Mode, Plan
from policies.prefix import block_keys, root_key
from policies.replica_state import Limits
from policies.request import State
from policies.stack import StackSpec
from runtime.engine import Engine
from tests.policies.byhand import PlainQueue
from tests.runtime.engines import Listener, Rows, greedy, tiny, tokens_of

AMPLE = Limits(600, 8, 8, 64, 256, lag=1)
Tokens = list[tuple[int, ...]]


class AtRandom(PlainQueue):
    """Admits, swaps out, stops for recomputation, runs all or nobody: as a seeded stream says."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.modes: set[Mode] = set()
        self._random = random.Random(seed)

    def plan(self, view: View, now: int) -> Plan:
        draft, chance = view.draft(), self._random
        stops = chance.random() < 0.15
        if stops or not draft.run_everyone(chance.choice([None, 5, 17])):
            for request in list(view.running.values()):
                if request.num_output_tokens < request.max_tokens and chance.random() < 0.5:
                    mode = Mode.SWAP if draft.can_swap(request) and chance.random() < 0.7 else Mode.RECOMPUTE
                    self.modes.add(mode)
                    draft.preempt(request, mode)
        for request in list(self.queue):
            if chance.random() < 0.6 and draft.admit(request, max_chunk=chance.choice([None, 6])):
                self.queue.remove(request)
            elif request.state is State.WAITING and chance.random() < 0.3:
                draft.plan.fetch.append((request, "host"))
        draft.wake_at(now + 200_000)
        return draft.finish()


def conversations(engine: Engine, turns: int) -> tuple[Tokens, list[list[int]]]:
    """Ten conversations, two of each five of which begin alike; all that was said, and the last prompts."""
    talks = [[(7 * (i % 5) + 3 * j) % 500 + 1 for j in range(14)] + [i + 1] * (3 + i) for i in range(10)]
    said: Tokens = []
    for turn in range(turns):
        answers = tokens_of(engine.generate(talks, greedy(7)))
        said += answers
        talks = [[*talk, *answer, turn + 3, 5] for talk, answer in zip(talks, answers, strict=True)]
    return said, talks


@pytest.fixture(scope="module")
def expected() -> Tokens:
    with Engine(tiny(), AMPLE, StackSpec().build(block_size=8)) as engine:
        return conversations(engine, 5)[0]


@pytest.mark.parametrize(("offload", "lag"), [("write_back", 0), ("write_through", 1), ("after_hits", 1)])
def test_fifty_requests_in_a_random_schedule_say_what_they_say_with_memory_ample(
    offload: str, lag: int, expected: Tokens
) -> None:
    rows, scheduler = Rows(), AtRandom(lag)
    stack = StackSpec(offload=offload).build(block_size=8)
    stack.scheduler = scheduler
    limits = Limits(26, 8, 4, 64, 256, lag=lag, num_host_blocks=70)
    with Engine(tiny(), limits, stack, recorder=rows, check=True) as engine:
        assert conversations(engine, 5)[0] == expected
    assert len(expected) == len(set(expected)) == 50
    assert scheduler.modes == {Mode.SWAP, Mode.RECOMPUTE}
    assert sum(step["fetched"] for step in rows.steps) > 0
    assert all(step["offloaded"] <= step["swapped_out"] for step in rows.steps)
    assert all(step["copy_wait_ns"] == step["copy_out_ns"] + step["copy_in_ns"] for step in rows.steps)  # on a CPU


def test_who_goes_away_while_blocks_are_on_their_way_disturbs_nobody(expected: Tokens) -> None:
    """Clients leave at any time: with blocks being written back, swapped out, or fetched for them."""
    stack = StackSpec(preemption="last_admitted,mode=swap", offload="write_back").build(block_size=8)
    limits = Limits(26, 8, 4, 64, 256, lag=1, num_host_blocks=70)
    with Engine(tiny(), limits, stack, check=True) as engine:
        said, talks = conversations(engine, 3)
        assert said == expected[:30]
        for leaves in range(3):
            listeners = [Listener() for _ in talks]
            ids = [engine.submit(talk, greedy(7), listener) for talk, listener in zip(talks, listeners, strict=True)]
            for request_id in ids[leaves::3]:
                engine.cancel(request_id)
            for listener in listeners:
                listener.last()
        assert tokens_of(engine.generate(talks, greedy(7))) == expected[30:40]


def test_prompts_of_another_salt_fetch_nothing_and_say_the_same() -> None:
    prompt = list(range(3, 43))
    rows = Rows()
    stack = StackSpec(offload="write_through").build(block_size=8)
    with Engine(tiny(), Limits(12, 8, 4, 64, 256, num_host_blocks=40), stack, recorder=rows, check=True) as engine:
        plain = tokens_of(engine.generate([prompt], greedy(4)))
        tokens_of(engine.generate([[9] * 80], greedy(4)))  # which evicts it from the device
        assert tokens_of(engine.generate([prompt], greedy(4))) == plain
    assert rows.requests[2]["fetched_tokens"] > 0
    assert not {*block_keys(prompt, 8)} & {*block_keys(prompt, 8, root_key(b"another tenant"))}
