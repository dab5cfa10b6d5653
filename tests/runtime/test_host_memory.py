"""Requests that are swapped to host memory and back: their tokens are what they would be had they stayed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from policies.replica_state import Limits
from policies.stack import StackSpec
from runtime.engine import Engine
from tests.runtime.engines import Rows, greedy, tiny, tokens_of

TOKENS = 40
PROMPTS = [[(7 * i + 3 * j) % 500 + 1 for j in range(5 + 9 * i)] for i in range(8)]
ALIKE = [[11, 5, 7] * 20 + [20 + i] * (3 + 4 * i) for i in range(8)]
TIGHT = Limits(24, 8, 8, 64, 256)


def run(prompts: list[list[int]], preemption: str, **limits: Any) -> tuple[list[tuple[int, ...]], Rows]:
    rows = Rows()
    stack = StackSpec(preemption=preemption, admission="full_prompt").build(block_size=8)
    with Engine(tiny(), replace(TIGHT, **limits), stack, recorder=rows, check=True) as engine:
        return tokens_of(engine.generate(prompts, greedy(TOKENS))), rows


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("lag", [0, 1])
def test_greedy_tokens_are_the_same_with_memory_ample_recomputed_and_swapped(lag: int, caching: bool) -> None:
    prompts = ALIKE if caching else PROMPTS
    shared: dict[str, Any] = {"lag": lag, "prefix_caching": caching}
    ample, none = run(prompts, "last_admitted", num_blocks=400, **shared)
    recomputed, some = run(prompts, "last_admitted", **shared)
    swapped, moved = run(prompts, "last_admitted,mode=swap", num_host_blocks=64, **shared)
    full, both = run(prompts, "last_admitted,mode=swap", num_host_blocks=10, **shared)
    assert len(set(ample)) == len(prompts)
    assert ample == recomputed == swapped == full
    modes = [
        {row["reason"] for row in rows.decisions if row["kind"] == "preempt"} for rows in (none, some, moved, both)
    ]
    assert modes == [set(), {"recompute"}, {"swap"}, {"recompute", "swap"}]
    out, back = (sum(step[name] for step in moved.steps) for name in ("swapped_out", "swapped_in"))
    assert out >= back > 0
    assert (out == back) == (not caching)  # what is still cached need not come back over the link
