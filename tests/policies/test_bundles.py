"""A bundle of a plan runs whole or not at all."""

from __future__ import annotations

from typing import Any

import pytest

from policies.plan import Plan
from policies.prefix import block_keys
from policies.replica_state import Limits
from policies.request import Request
from tests.policies.byhand import Desk
from tests.policies.scene import LIMITS, make_scene


def bundle(*requests: Request) -> frozenset[int]:
    return frozenset(r.id for r in requests)


def test_a_bundle_that_fits_runs_whole() -> None:
    desk = Desk(LIMITS)
    a, b, c = desk.submit(8), desk.submit(8), desk.submit(8)
    step = desk.plan(Plan(chunks=[(a, 8), (b, 8), (c, 8)], bundles=[bundle(a, c)]))
    assert step.admitted == [a, b, c]


@pytest.mark.parametrize("limit", ["slots", "blocks", "tokens"])
def test_a_bundle_that_does_not_fit_beside_the_rest_of_the_plan_does_not_run_in_part(limit: str) -> None:
    limits = {
        "slots": Limits(20, 4, 2, 32, 80, prefix_caching=False),
        "blocks": Limits(5, 4, 4, 32, 20, prefix_caching=False),
        "tokens": Limits(20, 4, 4, 20, 80, prefix_caching=False),
    }[limit]
    desk = Desk(limits)
    a, b, c = desk.submit(8), desk.submit(8), desk.submit(8)
    step = desk.plan(Plan(chunks=[(a, 8), (b, 8), (c, 8)], bundles=[bundle(a, c)]))
    assert step.refused == [(a, "its bundle does not fit"), (c, "its bundle does not fit")]
    assert step.admitted == [b]
    assert desk.scheduler.queue == [a, c]


def test_a_bundle_counts_the_tokens_and_blocks_that_the_decodes_of_its_step_take() -> None:
    for limits in (Limits(20, 4, 4, 16, 80, prefix_caching=False), Limits(5, 4, 4, 32, 20, prefix_caching=False)):
        desk = Desk(limits)
        running = desk.submit(4)
        desk.run(Plan(chunks=[(running, 4)]))
        a, b = desk.submit(8), desk.submit(8)
        step = desk.plan(Plan(decode_all=True, chunks=[(a, 8), (b, 8)], bundles=[bundle(a, b)]))
        assert step.refused == [(a, "its bundle does not fit"), (b, "its bundle does not fit")]
        assert step.num_decodes == 1
        assert step.admitted == []


def test_bundles_that_share_a_member_run_whole_or_not_at_all_as_one() -> None:
    for budget, runs in ((24, True), (23, False)):
        desk = Desk(Limits(20, 4, 4, budget, 80, prefix_caching=False))
        a, b, c = desk.submit(8), desk.submit(8), desk.submit(8)
        step = desk.plan(Plan(chunks=[(a, 8), (b, 8), (c, 8)], bundles=[bundle(a, b), bundle(b, c)]))
        assert step.admitted == ([a, b, c] if runs else [])
        assert [request for request, _ in step.refused] == ([] if runs else [a, b, c])


def test_a_bundle_with_a_member_that_cannot_run_does_not_run_in_part() -> None:
    scene = make_scene()
    plan = Plan(chunks=[(scene.waiting, 4), (scene.prefill, 99)], bundles=[bundle(scene.waiting, scene.prefill)])
    step = scene.desk.plan(plan)
    assert step.refused == [(r, "its bundle does not fit") for r in (scene.waiting, scene.prefill)]
    assert not step.runs


@pytest.mark.parametrize("tokens", [2.5, "3"])
def test_a_bundle_with_a_member_of_half_a_token_does_not_run_in_part(tokens: Any) -> None:
    desk = Desk(LIMITS)
    a, b = desk.submit(8), desk.submit(8)
    step = desk.plan(Plan(chunks=[(a, 8), (b, tokens)], bundles=[bundle(a, b)]))
    assert step.refused == [
        (b, f"{tokens!r} tokens, 0 to hold: not whole numbers"),
        (a, "its bundle does not fit"),
    ]
    assert not step.runs


def test_a_bundle_counts_the_idle_blocks_that_its_prefix_hits_take() -> None:
    desk = Desk(Limits(6, 4, 4, 32, 24))
    keys = tuple(block_keys([1] * 16, 4))
    first = desk.submit(16, keys=keys)
    desk.run(Plan(chunks=[(first, 16)]), first)
    # Four blocks idle, two free: `hit` takes three idle ones and one more, so only two are left for `other`.
    hit, other = desk.submit(16, keys=keys[:3]), desk.submit(12)
    step = desk.plan(Plan(chunks=[(hit, 4), (other, 12)], bundles=[bundle(hit, other)]))
    assert [reason for _, reason in step.refused] == ["its bundle does not fit"] * 2
    assert not step.runs
