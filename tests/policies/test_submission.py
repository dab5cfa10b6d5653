"""Requests that a replica takes in, and those that it can never serve."""

from __future__ import annotations

import re

import pytest

from policies.control_plane import RequestRefused
from policies.plan import Plan
from policies.prefix import block_keys
from policies.records import REQUESTS
from policies.replica_state import Limits
from policies.request import Request, State
from tests.policies.byhand import Desk
from tests.policies.scene import LIMITS


@pytest.mark.parametrize(
    ("prompt", "cap", "why"),
    [
        (0, 5, "the prompt is empty"),
        (4, 0, "max_tokens must be at least 1, not 0"),
        (80, 5, "the prompt has 80 tokens; the model's limit of 80 leaves room for a prompt of 79"),
        (200, 5, "the prompt has 200 tokens"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_with_both_numbers(prompt: int, cap: int, why: str) -> None:
    desk = Desk(LIMITS)
    with pytest.raises(RequestRefused, match=why):
        desk.submit(prompt, cap)
    assert desk.plane.num_live == 0
    assert [r.state for r in desk.ended] == [State.REFUSED]
    (row,) = desk.log.requests
    named = dict(zip(REQUESTS, row, strict=True))
    assert named["status"] == "refused"
    assert re.search(why, str(named["error"]))


def test_a_request_that_memory_can_never_hold_is_refused_with_both_numbers() -> None:
    desk = Desk(Limits(5, 4, 4, 32, 80, prefix_caching=False))
    with pytest.raises(RequestRefused, match="need 6 KV blocks of 4 tokens; this replica has 5"):
        desk.submit(14, 7)
    assert desk.submit(14, 6).state is State.WAITING


def test_the_cap_is_cut_to_what_the_models_limit_leaves() -> None:
    assert Desk(LIMITS).submit(70, 50).max_tokens == 10


def test_a_second_request_with_the_id_of_a_live_one_is_refused_and_leaves_the_first_ones_record_alone() -> None:
    desk = Desk(LIMITS)
    first = desk.submit(8)
    desk.run(Plan(chunks=[(first, 8)]))
    with pytest.raises(RequestRefused, match="request id 0 is in use"):
        desk.plane.submit(Request(0, desk.now, 4, 4), desk.now)
    desk.run(Plan(decode_all=True), first)
    refused, served = desk.log.requests
    assert (refused[0], refused[3], served[0], served[3]) == (0, 1, 0, 0)  # column 3: before_step


@pytest.mark.parametrize("caching", [True, False])
def test_names_of_blocks_are_kept_and_recorded_only_where_blocks_are_cached(caching: bool) -> None:
    desk = Desk(Limits(20, 4, 4, 32, 80, prefix_caching=caching))
    keys = tuple(block_keys([1] * 8, 4))
    request = desk.submit(9, keys=keys)
    desk.run(Plan(chunks=[(request, 9)]), request)
    (row,) = desk.log.requests
    assert list(dict(zip(REQUESTS, row, strict=True))["block_keys"]) == (list(keys) if caching else [])
    assert desk.plane.match(keys) == (2 if caching else 0)
