"""What a profile runs: the rounds that it draws, and the scheduler that spreads the sizes of their steps."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from experiments.profile_design import Design, Round
from experiments.profiling import ProfileScheduler
from policies.queues.fcfs import Fcfs
from policies.replica_state import Limits
from policies.stack import PolicyStack, StackSpec
from tests.policies.harness import Drive, Job

LIMITS = Limits(
    num_blocks=600,
    max_num_seqs=24,
    max_num_batched_tokens=256,
    max_model_len=900,
    prefix_caching=False,
    capture_sizes=(1, 2, 4, 8, 16, 24),
    mixed_capture_sizes=(64, 128, 256),
)
ROUNDS_A_CYCLE = 1 + 2 * 4 + 2 * 13 + 2


def drawn(limits: Limits, cycles: int, seed: int = 0) -> list[Round]:
    return list(itertools.islice(Design(limits, seed).rounds(), cycles * ROUNDS_A_CYCLE))


def test_a_cycle_of_a_design_has_every_kind_of_round() -> None:
    kinds = [one.kind for one in drawn(LIMITS, 1)]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "drain": 1, "edge": 4, "prompt": 4, "beside": 26, "mixed": 1, "skew": 1
    }  # fmt: skip


def test_a_design_runs_batches_and_prompts_as_large_as_what_is_captured_and_one_off() -> None:
    rounds = drawn(LIMITS, 4)
    batches = {len(one.requests) for one in rounds if one.kind == "edge"}
    assert batches == {1, 2, 3, 4, 5, 8, 9, 16, 17, 24}
    prompts = {one.requests[0][0] for one in rounds if one.kind == "prompt"}
    assert prompts >= {63, 64, 65, 127, 128, 129, 255, 256, 257}
    assert max(prompts) in (898, 899)  # as long as may be; it is rounded down


def test_prompts_beside_a_batch_make_steps_of_captured_sizes() -> None:
    steps = set()
    rounds = iter(drawn(LIMITS, 4))
    batch = 0
    for one in rounds:
        if one.kind == "beside" and one.requests[0][1] > 1:
            batch = len(one.requests)
        elif one.kind == "beside":
            steps.add(batch + sum(prompt for prompt, _ in one.requests))
    assert {64, 128, 256} <= steps


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "limits",
    [
        LIMITS,
        replace(LIMITS, capture_sizes=(), mixed_capture_sizes=()),
        replace(LIMITS, num_blocks=12, max_num_seqs=3, capture_sizes=(1, 2), mixed_capture_sizes=(64,)),
        replace(LIMITS, num_blocks=4, max_num_seqs=1, max_num_batched_tokens=16, max_model_len=40, capture_sizes=(1,)),
    ],
    ids=["usual", "eager", "little memory", "hardly any memory"],
)
def test_every_request_of_a_design_can_be_served_alone(limits: Limits, seed: int) -> None:
    memory = limits.num_blocks * limits.block_size
    for one in drawn(limits, 3, seed):
        assert 1 <= len(one.requests) <= max(limits.max_num_seqs, 6)
        for prompt, output in one.requests:
            assert prompt >= 1 <= output
            assert prompt + output <= min(limits.max_model_len, memory)


def test_a_design_is_the_same_again_for_the_same_seed_alone() -> None:
    assert drawn(LIMITS, 2, seed=5) == drawn(LIMITS, 2, seed=5) != drawn(LIMITS, 2, seed=6)


class Profiled(StackSpec):
    """A stack with the scheduler of a profile."""

    def build(self, **told: object) -> PolicyStack:
        stack = super().build(**told)  # type: ignore[arg-type]
        stack.scheduler = ProfileScheduler(Fcfs(), 0, swaps=True)
        return stack


def served(limits: Limits) -> Drive:
    jobs = [
        Job(prompt, output, arrives=3 * i)
        for i, one in enumerate(drawn(limits, 2))
        for prompt, output in one.requests
        if len(one.requests) <= limits.max_num_seqs
    ]
    return Drive(limits, Profiled(), jobs)


@pytest.mark.parametrize("blocks", [600, 80], ids=["usual", "little memory"])
def test_the_scheduler_of_a_profile_serves_everybody_within_the_budget(blocks: int) -> None:
    limits = replace(LIMITS, num_blocks=blocks, num_host_blocks=100, max_model_len=min(900, 8 * blocks))
    drive = served(limits)  # raises where somebody is never done
    assert not drive.refused
    assert all(drive.output_tokens(i) == job.output for i, job in enumerate(drive.jobs))
    sizes = [step.shape.num_tokens for step in drive.steps if step.runs]
    assert max(sizes) == 256


def test_the_scheduler_of_a_profile_spreads_budgets_and_swaps_now_and_then() -> None:
    drive = served(replace(LIMITS, num_host_blocks=100))
    cut = {step.shape.num_tokens for step in drive.steps if any(not chunk.samples for chunk in step.chunks)}
    assert len(cut - {256}) > 10  # below the whole budget, though there was more to do
    assert min(cut) < 64
    alone = [step.shape for step in drive.steps if step.shape.num_decodes > 1 and not step.shape.num_chunks]
    assert sum(shape.swapped_out > 0 for shape in alone) > 5
    assert sum(step.shape.swapped_in > 0 for step in drive.steps) > 5


def test_a_trace_is_profiled_with_the_whole_budget() -> None:
    scheduler = ProfileScheduler(Fcfs(), 0, swaps=False)
    scheduler.vary = False

    class Steady(StackSpec):
        def build(self, **told: object) -> PolicyStack:
            stack = super().build(**told)  # type: ignore[arg-type]
            stack.scheduler = scheduler
            return stack

    jobs = [Job(150 + 40 * i, 30, arrives=3 * i) for i in range(12)]
    steady, usual = Drive(LIMITS, Steady(), jobs), Drive(LIMITS, StackSpec(), jobs)
    assert [step.shape for step in steady.steps] == [step.shape for step in usual.steps]
    assert not any(step.shape.swapped_out for step in steady.steps)


def test_rounds_of_look_ups_come_twice_with_the_same_beginnings_and_other_lengths() -> None:
    rounds = list(itertools.islice(Design(LIMITS, 0).lookups(), 200))
    seen: set[int] = set()
    for first, second in zip(rounds[::2], rounds[1::2], strict=True):
        assert first.texts == second.texts
        assert len(first.texts) == len(first.requests) == len(second.requests)
        assert seen.isdisjoint(first.texts)
        seen.update(first.texts)
    sizes = [prompt for one in rounds for prompt, _ in one.requests]
    assert min(sizes) >= 1
    assert max(sizes) <= 899
    assert min(sizes) < 50 < 800 < max(sizes)
    assert {len(one.requests) for one in rounds} == {1, 2, 3, 4, 5, 6}
