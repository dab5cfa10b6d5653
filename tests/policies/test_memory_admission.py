"""Admission by reservation, by predicted peak and by a decaying ratio; and what they take for output lengths."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.admission.predicted_peak import Crowd, PredictedPeak, peak_tokens
from policies.plan import Mode, Plan, Report, Step
from policies.registry import PolicyError, make
from policies.replica_state import Limits
from policies.request import Request, State
from policies.stack import StackSpec
from tests.policies.byhand import Desk
from tests.policies.decisions import assert_same_run
from tests.policies.harness import Drive, Job

# Predictors


def test_a_declared_length_lies_between_one_and_the_cap() -> None:
    declared = make("predictor", "declared")
    said = [declared.predict(Request(0, 0, 5, 20, hints={"output_tokens": n})) for n in (0, 7, 30)]
    assert [*said, declared.predict(Request(0, 0, 5, 20))] == [1, 7, 20, 20]


def test_the_oracle_knows_the_length_and_wants_to_be_told() -> None:
    oracle = make("predictor", "oracle", oracle={3: 17})
    assert oracle.predict(Request(3, 0, 5, 20)) == 17
    assert oracle.clairvoyant
    with pytest.raises(PolicyError, match="known beforehand"):
        make("predictor", "oracle")


def test_noise_is_log_normal_with_median_one_and_its_stated_deviation() -> None:
    lengths = dict.fromkeys(range(20_000), 10**6)
    noisy = make("predictor", "noisy_oracle,error=0.5", oracle=lengths, seed=1)
    logs = [math.log(noisy.predict(Request(i, 0, 5, 10**9)) / 10**6) for i in lengths]
    assert statistics.fmean(logs) == pytest.approx(0, abs=0.015)  # four standard errors
    assert statistics.stdev(logs) == pytest.approx(0.5, rel=0.02)
    for within, share in ((0.5, 0.6827), (1.0, 0.9545)):
        assert sum(abs(x) < within for x in logs) / len(logs) == pytest.approx(share, abs=0.014)


def test_noise_is_a_requests_own_whoever_else_is_asked_about() -> None:
    lengths = dict.fromkeys(range(50), 100)
    one, other = (make("predictor", "noisy_oracle", oracle=lengths, seed=2) for _ in range(2))
    everybody = [one.predict(Request(i, 0, 5, 900)) for i in range(50)]
    assert [other.predict(Request(i, 0, 5, 900)) for i in reversed(range(0, 50, 2))] == everybody[::-1][1::2]
    assert len(set(everybody)) == 50
    exact = make("predictor", "noisy_oracle,error=0", oracle=lengths)
    assert exact.predict(Request(0, 0, 5, 900)) == 100


def test_a_moving_average_is_of_the_tenants_last_five() -> None:
    average = make("predictor", "moving_average")
    a, b = Request(0, 0, 5, 50, tenant="a"), Request(1, 0, 5, 50, tenant="b")
    assert average.predict(a) == 50  # the cap, as nothing has ended
    for n in (100, 10, 20, 30, 40, 25):
        average.on_end(a, n)
    assert average.predict(a) == (10 + 20 + 30 + 40 + 25) / 5
    assert average.predict(b) == 50
    average.on_end(b, 90)
    assert average.predict(b) == 50  # never above the cap


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=30), st.integers(0, 70), st.floats(0, 1), st.integers(1, 8))
def test_a_quantile_is_of_the_last_lengths_beyond_what_is_generated(
    ends: list[int], done: int, q: float, window: int
) -> None:
    quantile = make("predictor", f"quantile,q={q},window={window}")
    request = Request(0, 0, 5, 55)
    request._tokens = 5 + done
    for n in ends:
        quantile.on_end(request, n)
    beyond = sorted(n for n in ends[-window:] if n > done)
    expected = min(55, beyond[round(q * (len(beyond) - 1))]) if beyond else 55
    assert quantile.predict(request) == expected


# Reservation

PAGED = "watermark,watermark=0"
FAMILY = ["reserve_max", "reserve_pow2", "reserve_oracle"]
JOBS = st.lists(
    st.builds(
        lambda prompt, output, arrives, spare: Job(prompt, output, arrives, cap=output + spare),
        st.integers(1, 40), st.integers(1, 30), st.integers(0, 20), st.integers(0, 30),
    ),
    min_size=1, max_size=12,
)  # fmt: skip


def test_what_each_rule_reserves_for_a_true_output_of_25() -> None:
    """The example of Kwon et al., section 6.1: 32 positions for 25 tokens."""
    request = Request(0, 0, 100, 2048)
    rules = [make("admission", name, block_size=1, oracle={0: 25}) for name in FAMILY]
    assert [rule.most(request) for rule in rules] == [100 + 2048, 100 + 32, 100 + 25]
    assert [rules[1].most(Request(0, 0, 1, cap)) for cap in (26, 2048)] == [27, 33]


@pytest.mark.parametrize(("output", "rounded"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (32, 32), (33, 64)])
def test_pow2_rounds_up_to_a_power_of_two(output: int, rounded: int) -> None:
    rule = make("admission", "reserve_pow2", block_size=1, oracle={0: output})
    assert rule.most(Request(0, 0, 10, 2048)) == 10 + rounded


@pytest.mark.parametrize("name", FAMILY)
@settings(max_examples=20, deadline=None)
@given(
    JOBS, st.sampled_from(["mixed", "prefill_first", "sarathi,chunk_size=12"]), st.integers(25, 45), st.integers(0, 1)
)
def test_no_reservation_that_holds_true_ever_preempts(
    name: str, work: list[Job], scheduler: str, blocks: int, lag: int
) -> None:
    limits = Limits(blocks, 4, 6, 32, 100, prefix_caching=False, lag=lag)
    drive = Drive(limits, StackSpec(scheduler, admission=name), work)
    assert all(request.num_preemptions == 0 for request in drive.requests)
    rule = drive.stack.admission
    assert rule.reserved_blocks == 0  # type: ignore[attr-defined]


@settings(max_examples=20, deadline=None)
@given(JOBS, st.integers(25, 60))
def test_at_a_fixed_time_max_admits_no_more_than_pow2_than_oracle_than_paged(work: list[Job], blocks: int) -> None:
    limits = Limits(blocks, 4, 12, 500, 100, prefix_caching=False)
    for job in work:
        job.arrives = 0
    counts = []
    for name in [*FAMILY, PAGED]:
        drive = Drive(limits, StackSpec("prefill_first", admission=name), work)
        counts.append(len(drive.steps[0].admitted))
    assert counts == sorted(counts)


@settings(max_examples=20, deadline=None)
@given(JOBS, st.integers(25, 60), st.integers(0, 1))
def test_with_caps_that_are_the_true_lengths_max_and_oracle_decide_alike(
    work: list[Job], blocks: int, lag: int
) -> None:
    for job in work:
        job.cap = None
    limits = Limits(blocks, 4, 6, 32, 100, prefix_caching=False, lag=lag)
    assert_same_run(limits, work, StackSpec(admission="reserve_max"), StackSpec(admission="reserve_oracle"))


class Measured(Drive):
    """Also keeps, step by step, how many run, the tokens they have computed, and the blocks set aside for them."""

    def _execute(self, step: Step) -> list[tuple[Request, State, int]]:
        running = list(self.plane.view.running.values())
        rows = self.__dict__.setdefault("rows", [])
        taken = sum(r.num_blocks for r in running)
        reserved = getattr(self.stack.admission, "reserved_blocks", taken)
        rows.append((len(running), sum(r.num_computed_tokens for r in running), reserved))
        return super()._execute(step)


def chat(count: int = 150) -> list[Job]:
    draw = random.Random(5)
    return [Job(draw.randint(5, 60), min(250, 1 + int(draw.expovariate(1 / 50))), cap=256) for _ in range(count)]


def test_real_tokens_fill_more_of_the_reserved_memory_from_max_to_pow2_to_oracle_to_paged() -> None:
    """The shape of Kwon et al., figure 2: 20.4 %, 26.8 %, 38.2 % and 96.3 % there, on other requests."""
    limits = Limits(160, 16, 64, 512, 400, prefix_caching=False)
    shares, counts = [], []
    for name in [*FAMILY, PAGED]:
        rows = Measured(limits, StackSpec(admission=name), chat()).rows  # type: ignore[attr-defined]
        full = rows[: len(rows) // 2]  # while many wait
        counts.append(statistics.fmean(n for n, _, _ in full))
        shares.append(sum(tokens for _, tokens, _ in full) / (16 * sum(blocks for _, _, blocks in full)))
    assert all(a + 0.05 < b for a, b in itertools.pairwise(shares)), shares
    assert all(a < b for a, b in itertools.pairwise(counts)), counts
    assert shares[0] < 0.4
    assert shares[-1] > 0.85


# Predicted peak


def simulated_peak(held: list[int], left: list[int], block: int = 1) -> int:
    """Step by step, the slow way: blocks taken at the worst time."""
    worst = 0
    for t in range(max(left) + 1):
        alive = [h + t for h, n in zip(held, left, strict=True) if n >= t]
        worst = max(worst, sum(-(-tokens // block) for tokens in alive))
    return worst


def test_the_peak_is_that_of_a_simulation_on_5000_sets() -> None:
    """Oracle H1; with blocks it bounds the simulation, and by less than a block for each request."""
    draw = random.Random(1)
    for _ in range(5000):
        m = draw.randint(1, 8)
        held, left = [draw.randint(1, 30) for _ in range(m)], [draw.randint(0, 25) for _ in range(m)]
        arrays = np.array(held), np.array(left)
        assert peak_tokens(*arrays) == simulated_peak(held, left)
        bound = peak_tokens(*arrays, 3)
        assert bound - 3 * m <= 4 * simulated_peak(held, left, 4) <= bound + 3 * m
        assert simulated_peak(held, left, 4) * 4 <= bound


def test_the_worst_of_several_samples_counts() -> None:
    left = np.array([[1, 1], [9, 0], [2, 2]])
    assert peak_tokens(np.array([5, 5]), left) == 14
    assert [peak_tokens(np.array([5, 5]), row) for row in left] == [12, 14, 14]


SETS = st.lists(st.tuples(st.integers(1, 30), st.tuples(st.integers(1, 25), st.integers(1, 25))), max_size=8)


@settings(max_examples=60, deadline=None)
@given(SETS, SETS, st.integers(0, 15))
def test_whoever_is_added_to_a_crowd_one_by_one_the_peak_is_that_of_all_together(
    first: list[tuple[int, tuple[int, int]]], then: list[tuple[int, tuple[int, int]]], per_request: int
) -> None:
    def columns(sets: list[tuple[int, tuple[int, int]]]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([held for held, _ in sets], int), np.array([left for _, left in sets], int).reshape(-1, 2).T

    crowd = Crowd.of(*columns(first))
    for i, (held, left) in enumerate(then):
        crowd = crowd.with_one_more(held, np.array(left))
        held_by, left_by = columns([*first, *then[: i + 1]])
        assert crowd.peak(per_request) == peak_tokens(held_by, left_by, per_request)
        assert crowd.peak(0) == max(simulated_peak(held_by.tolist(), row.tolist()) for row in left_by)


def test_one_requests_forecast_is_that_which_it_has_among_others() -> None:
    rule = PredictedPeak(1, window=4, seed=3)
    requests = [Request(i, 0, 5 + i, 60) for i in range(6)]
    for lengths in ((), (40,), (10, 20, 40, 80)):
        rule.on_report(ended(*lengths))
        for done in (0, 10, 39, 80):
            for request in requests:
                request._tokens = request.num_prompt_tokens + done
                request.max_tokens = max(60, done)
            held, left = rule._forecast(requests)
            alone = [rule._forecast_one(request) for request in requests]
            assert [one[0] for one in alone] == held.tolist()
            assert [one[1].tolist() for one in alone] == left.T.tolist()


LOCK_STEP = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 25), st.integers(0, 20)), min_size=1, max_size=12)


@pytest.mark.parametrize("lag", [0, 1])
@settings(max_examples=30, deadline=None)
@given(LOCK_STEP, st.integers(1, 4), st.integers(48, 90))
def test_in_lock_step_true_lengths_never_preempt_and_caps_neither_and_admit_no_more(
    lag: int, sizes: list[tuple[int, int, int]], block: int, tokens: int
) -> None:
    """Oracle H1. Prompts are prefilled whole, so that everybody gets a token in every step."""
    work = [Job(prompt, output, cap=output + spare, hints={"output_tokens": output + spare})
            for prompt, output, spare in sizes]  # fmt: skip
    limits = Limits(-(-tokens // block) + 20, block, 12, 1000, 66, prefix_caching=False, lag=lag)
    firsts = []
    for estimates in ("declared", "oracle"):
        drive = Drive(limits, StackSpec("mixed", admission=f"predicted_peak,limit=1,estimates={estimates}"), work)
        assert all(request.num_preemptions == 0 for request in drive.requests)
        firsts.append(len(drive.steps[0].admitted))
    assert firsts[0] <= firsts[1]


def test_a_candidate_fits_up_to_the_very_token() -> None:
    for prompt, fits in ((30, True), (31, False)):
        desk = Desk(Limits(100, 1, 4, 200, 100, prefix_caching=False))
        desk.plane.stack.admission = make("admission", "predicted_peak,estimates=declared,limit=0.95", block_size=1)
        first = desk.submit(40, cap=16)
        desk.run(Plan(chunks=[(first, 40)]))  # holds 41 tokens, 15 to come
        # With a cap of 12: two of them at 12 more each, 41 + 30 + 24 = 95.
        assert desk.plane.view.draft().admit(desk.submit(prompt, cap=12)) is fits


def ended(*lengths: int) -> Report:
    return Report(Step(0, 0), 0, 0, 0, [(Request(i, 0, 1, n), State.STOPPED, n) for i, n in enumerate(lengths)])


def test_history_is_drawn_from_beyond_what_is_generated_and_never_above_the_cap() -> None:
    rule = PredictedPeak(1, window=4, samples=400)
    request = Request(7, 0, 5, 60)
    assert set(rule._forecast([request])[1].ravel()) == {60}  # nothing has ended: the cap
    rule.on_report(ended(500, 10, 20, 40, 80))  # 500 is out of the window
    request._tokens = 5 + 20  # twenty generated: those to come end between 40 and 80, capped at 60
    drawn = rule._forecast([request])[1].ravel() + 20
    assert drawn.min() in (40, 41)
    assert drawn.max() == 60
    assert (drawn < 60).mean() == pytest.approx(0.475, abs=0.1)  # uniform between 40 and 80: up to 59 of 40
    request._tokens = 5 + 80
    request.max_tokens = 90
    assert set(rule._forecast([request])[1].ravel()) == {10}  # nobody got so far


def test_draws_are_a_requests_own_and_new_with_each_token() -> None:
    rule = PredictedPeak(1, seed=3)
    rule.on_report(ended(*range(10, 200)))
    one, other = Request(1, 0, 5, 500), Request(2, 0, 5, 500)
    alone, both = rule._forecast([other])[1], rule._forecast([one, other])[1]
    assert (both[:, 1] == alone[:, 0]).all()
    assert (both[:, 0] != both[:, 1]).any()
    other._tokens += 1
    assert (rule._forecast([other])[1] + 1 != alone).any()


def test_what_a_paused_request_holds_is_not_free() -> None:
    desk = Desk(Limits(100, 1, 4, 200, 100, prefix_caching=False))
    desk.plane.stack.admission = make("admission", "predicted_peak,estimates=declared,limit=1", block_size=1)
    first, second = desk.submit(40, cap=5), desk.submit(10, cap=5)
    desk.run(Plan(chunks=[(first, 40), (second, 10)]))
    desk.run(Plan(decode_all=True, preempt=[(first, Mode.KEEP)]))
    # Paused 40; the second holds 12 and has 3 to come; the candidate's peak: 2 * 3 + 12 + 40 = 58 of 60, then 40 + 5.
    assert [desk.plane.view.draft().admit(desk.submit(n, cap=5)) for n in (40, 42, 43)] == [True, True, False]


# Decaying ratio


def test_the_ratio_falls_jumps_and_starts_again_as_worked_by_hand() -> None:
    desk = Desk(Limits(100, 1, 8, 200, 100, prefix_caching=False))
    rule = make("admission", "decaying_ratio,start=0.5,floor=0.2,decay_steps=4", block_size=1)
    desk.plane.stack.admission = rule
    requests = [desk.submit(10, cap=60) for _ in range(3)]
    seen = []
    desk.run(Plan(chunks=[(r, 10) for r in requests]))
    seen.append(rule.ratio)
    for _ in range(4):
        desk.run(Plan(decode_all=True))
        seen.append(rule.ratio)
    assert seen == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.1])
    desk.run(Plan(decode_all=True, preempt=[(requests[2], Mode.RECOMPUTE)]))
    # Two go on, with five tokens each as that step begins: (10 + 20 * 2) / (120 + 1); the step itself does not decay.
    assert rule.ratio == pytest.approx(50 / 121)
    desk.run(Plan(decode_all=True))
    assert rule.ratio == pytest.approx(50 / 121 - 0.1)
    desk.run(Plan(decode_all=True), requests[0], requests[1])
    assert rule.ratio == 0.5


def test_with_a_step_in_flight_neither_its_report_nor_that_of_the_step_that_preempts_takes_off_the_jump() -> None:
    desk = Desk(Limits(100, 1, 8, 200, 100, prefix_caching=False, lag=1))
    rule = make("admission", "decaying_ratio,start=0.5,floor=0.2,decay_steps=4", block_size=1)
    desk.plane.stack.admission = rule
    requests = [desk.submit(10, cap=60) for _ in range(3)]
    desk.run(Plan(chunks=[(r, 10) for r in requests]))
    assert rule.ratio == pytest.approx(0.4)
    in_flight = desk.plan(Plan(decode_all=True))
    preempting = desk.plan(Plan(decode_all=True, preempt=[(requests[2], Mode.RECOMPUTE)]))
    jump = (2 * 2 + 20 * 2) / 121
    seen = []
    for step in (in_flight, preempting):
        desk.report(step)
        seen.append(rule.ratio)
    after = desk.plan(Plan(decode_all=True))
    desk.report(after)
    assert [*seen, rule.ratio] == pytest.approx([jump, jump, jump - 0.1])


def test_pausing_somebody_is_no_preemption_that_stops_the_decay() -> None:
    desk = Desk(Limits(100, 1, 8, 200, 100, prefix_caching=False))
    rule = make("admission", "decaying_ratio,start=0.5,floor=0.2,decay_steps=4", block_size=1)
    desk.plane.stack.admission = rule
    requests = [desk.submit(10, cap=60) for _ in range(2)]
    desk.run(Plan(chunks=[(r, 10) for r in requests]))
    desk.run(Plan(decode_all=True, preempt=[(requests[1], Mode.KEEP)]))
    assert rule.ratio == pytest.approx(0.3)


class Looked(list):
    """A plan's chunks, which count how often one of them is looked at."""

    looks = 0

    def __iter__(self):  # type: ignore[no-untyped-def]
        for item in super().__iter__():
            Looked.looks += 1
            yield item

    def __getitem__(self, at):  # type: ignore[no-untyped-def]
        found = super().__getitem__(at)
        Looked.looks += len(found) if isinstance(at, slice) else 1
        return found


def test_admitting_many_in_a_step_looks_at_each_chunk_once() -> None:
    desk = Desk(Limits(4000, 1, 100, 2000, 100, prefix_caching=False))
    desk.plane.stack.admission = make("admission", "decaying_ratio", block_size=1)
    draft, Looked.looks = desk.plane.view.draft(), 0
    draft.plan.chunks = Looked()
    assert all(draft.admit(desk.submit(10, cap=12)) for _ in range(60))
    assert Looked.looks <= 60


def test_the_ratio_never_jumps_above_one() -> None:
    desk = Desk(Limits(100, 1, 8, 200, 100, prefix_caching=False))
    rule = desk.plane.stack.admission = make("admission", "decaying_ratio", block_size=1)
    first, second = desk.submit(10, cap=5), desk.submit(10, cap=5)
    desk.run(Plan(chunks=[(first, 10), (second, 10)]))
    desk.run(Plan(decode_all=True, preempt=[(second, Mode.RECOMPUTE)]))
    assert rule.ratio == 1.0


@pytest.mark.parametrize(("prompt", "fits"), [(45, True), (46, False)])
def test_a_cap_must_fit_beside_a_share_of_what_others_may_need(prompt: int, fits: bool) -> None:
    desk = Desk(Limits(100, 1, 8, 200, 100, prefix_caching=False))
    rule = desk.plane.stack.admission = make("admission", "decaying_ratio", block_size=1)
    desk.run(Plan(chunks=[(desk.submit(20, cap=41), 20)]))
    rule.ratio = 0.5
    # 80 free, 0.5 * 40 spoken for: prompt + 14 < 60.
    assert desk.plane.view.draft().admit(desk.submit(prompt, cap=14)) is fits


def test_what_is_admitted_in_the_same_step_counts_with_its_whole_cap_and_caps_are_clipped() -> None:
    desk = Desk(Limits(100, 1, 8, 200, 100, prefix_caching=False))
    desk.plane.stack.admission = make("admission", "decaying_ratio,clip=10", block_size=1)
    draft = desk.plane.view.draft()
    # 100 - 30 - 10 = 60 left after the first; then 60 - 39 - 10 = 11 for the third, which asks for less than that.
    assert [draft.admit(desk.submit(n, cap=50)) for n in (30, 39, 1, 0 + 2)] == [True, True, False, False]
    assert draft.admit(desk.submit(1, cap=9))


# Watermark


def test_a_watermark_saves_preemptions_until_it_costs_more_than_it_saves() -> None:
    """Oracle H2, qualitative: preemptions fall; the time to serve everybody, in steps of a fixed time, is U-shaped."""
    limits = Limits(100, 16, 64, 128, 400, prefix_caching=False)
    preemptions, steps = [], []
    for watermark in (0, 0.1, 0.5, 0.8):
        stack = StackSpec("prefill_first", admission=f"watermark,watermark={watermark}")
        drive = Drive(limits, stack, chat(100))
        preemptions.append(sum(r.num_preemptions for r in drive.requests))
        steps.append(len(drive.steps))
    assert preemptions == sorted(preemptions, reverse=True)
    assert preemptions[0] > 2 * preemptions[1] > 0 == preemptions[2]
    assert steps[0] > steps[1] < steps[2] < steps[3]


@pytest.mark.parametrize(
    "text",
    ["predicted_peak,limit=0", "predicted_peak,window=0", "predicted_peak,samples=0", "predicted_peak,limit=1.1",
     "decaying_ratio,start=0", "decaying_ratio,floor=2", "decaying_ratio,decay_steps=0", "decaying_ratio,clip=0",
     "reserve_oracle"],
)  # fmt: skip
def test_knobs_outside_their_ranges_are_refused(text: str) -> None:
    with pytest.raises(PolicyError):
        make("admission", text, block_size=4)
