"""Requests that are swapped to host memory and back: their tokens are what they would be had they stayed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from policies.contract import View
from policies.plan import BlockCopy, Mode, Plan
from policies.replica_state import Limits
from policies.request import Request
from policies.stack import StackSpec
from runtime.engine import Engine
from runtime.host_memory import HostMemory
from runtime.kv_cache import PagedKVCache
from runtime.model_config import ModelConfig
from tests.policies.byhand import PlainQueue
from tests.runtime.engines import Rows, greedy, serve, submit_together, tiny, tokens_of

TOKENS = 40
PROMPTS = [[(7 * i + 3 * j) % 500 + 1 for j in range(5 + 9 * i)] for i in range(8)]
ALIKE = [[11, 5, 7] * 20 + [20 + i] * (3 + 4 * i) for i in range(8)]
TIGHT = Limits(24, 8, 8, 64, 256)


def run(prompts: list[list[int]], preemption: str, **limits: Any) -> tuple[list[tuple[int, ...]], Rows]:
    rows = Rows()
    stack = StackSpec(preemption=preemption, admission="full_prompt").build(block_size=8)
    with Engine(tiny(), replace(TIGHT, **limits), stack, recorder=rows, check=True) as engine:
        return tokens_of(engine.generate(prompts, greedy(TOKENS))), rows


@pytest.mark.parametrize(("lag", "caching"), [(0, False), (1, True)])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("head_dim", "block_size"), [(16, 4), (2, 1)])
def test_blocks_come_back_bit_for_bit_in_other_places(dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    config = ModelConfig(64, 8, 3, 2, 2, head_dim, 8, 64)
    cache = PagedKVCache(config, 10, block_size, dtype=dtype, device="cpu")
    bits = cache.blocks.view(torch.uint8)
    bits.random_(0, 256, generator=torch.Generator().manual_seed(1))
    before, request = bits.clone(), Request(0, 0, 1, 1)
    host = HostMemory(cache, 8)
    host._most = 2  # packed in several rounds
    host.make([BlockCopy(request, True, (9, 2, 4, 3, 0), (5, 6, 1, 7, 0))])
    assert torch.equal(bits, before)
    bits.zero_()
    host.make([BlockCopy(request, False, (1, 8, 2), (1, 5, 7))])
    assert torch.equal(bits[:, :, [1, 8, 2]], before[:, :, [4, 9, 3]])
    assert not bits[:, :, [0, 3, 4, 5, 6, 7, 9]].any()
    host.close()


class TurnsByTwos(PlainQueue):
    """Runs two requests at a time, and every few steps swaps those out for the next two: memory is never short."""

    def __init__(self) -> None:
        super().__init__()
        self.swaps_in_prefill = 0

    def plan(self, view: View, now: int) -> Plan:
        draft = view.draft()
        running = [r for r in view.running.values() if r.num_output_tokens < r.max_tokens]
        if self.queue and running and all(r.num_computed_tokens % 3 == 0 for r in running):
            for request in running:
                self.swaps_in_prefill += request.num_pending_tokens > 1
                draft.preempt(request, Mode.SWAP)
        else:
            draft.run_everyone(5)
        while self.queue and len(view.running) - len(draft.preempted) + len(draft.admitted) < 2:
            if not draft.admit(self.queue[0], max_chunk=6):
                break
            self.queue.pop(0)
        if not draft.num_tokens and self.queue:
            draft.wake_at(now + 1_000_000)
        return draft.finish()


@pytest.mark.parametrize("lag", [0, 1])
def test_tokens_survive_swapping_at_will_in_prefills_and_decodes_and_in_plans_that_run_nothing(lag: int) -> None:
    with serve(tiny(), block_size=8, max_num_seqs=8, max_num_batched_tokens=64) as engine:
        expected = tokens_of(engine.generate(PROMPTS, greedy(16)))
    rows, turns = Rows(), TurnsByTwos()
    limits: dict[str, Any] = {"block_size": 8, "max_num_seqs": 2, "max_num_batched_tokens": 64, "num_host_blocks": 200}
    with serve(tiny(), turns, recorder=rows, lag=lag, prefix_caching=False, **limits) as engine:
        listeners = submit_together(engine, PROMPTS, greedy(16))
        assert [(listener.last(), listener.token_ids)[1] for listener in listeners] == expected
    assert turns.swaps_in_prefill > 0
    assert rows.num_preemptions > 20
