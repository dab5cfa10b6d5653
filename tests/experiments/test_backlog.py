"""The largest difference of service between tenants that both have requests waiting: by hand, and the slow way."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.backlog import ServiceGap, largest_gap
from experiments.compare import compare
from experiments.fairness import services
from experiments.metrics import summarize
from experiments.records import Run
from tests.experiments.fake_run import fake_run, random_requests
from tests.experiments.rows import write_run


def request(i: int, tenant: str, arrives: int, starts: int | None, tokens: tuple[int, ...], prompt: int = 5) -> dict:
    """Its tokens come with the steps of these numbers; step n ends at 10 n + 10."""
    ends = [10 * step + 10 for step in tokens]
    return {
        "request_id": i,
        "tenant": tenant,
        "arrival_ns": arrives,
        "prompt_tokens": prompt,
        "first_scheduled_ns": starts,
        "output_tokens": len(tokens),
        "token_steps": list(tokens),
        "first_token_ns": ends[0] if ends else None,
        "finish_ns": ends[-1] if ends else None,
        "status": "length" if ends else "unfinished",
    }


def run_of(folder: Path, requests: list[dict[str, Any]], num_steps: int = 30) -> Run:
    steps = [{"step": i, "plan_ns": 10 * i, "end_ns": 10 * i + 10, "padded_tokens": 1} for i in range(num_steps)]
    return write_run(folder, requests, steps)


def test_only_service_while_both_wait_counts(tmp_path: Path) -> None:
    """Both wait from 20, when the second request of b comes, to 60: in that time a is given 4 tokens, b nothing."""
    requests = [
        request(0, "a", 0, 0, tuple(range(12))),
        request(1, "a", 0, 120, (12, 13)),
        request(2, "b", 20, 60, (6,), prompt=50),
    ]
    assert largest_gap(run_of(tmp_path / "run", requests)) == ServiceGap(8, "a", "b", 20, 60)


def test_an_input_counts_where_somebody_still_waits_when_it_is_admitted(tmp_path: Path) -> None:
    requests = [
        request(0, "a", 0, 0, (0, 1)),
        request(1, "a", 0, 200, (20,)),
        request(2, "b", 0, 30, (3,), prompt=50),
        request(3, "b", 0, 40, (4,), prompt=70),
    ]
    # a: 5 at 0 and two tokens by 20; b: 50 at 30 and a token at 40, when its last request is admitted: 70 too late.
    assert largest_gap(run_of(tmp_path / "run", requests)) == ServiceGap(52, "b", "a", 20, 40)


def test_a_difference_over_a_part_of_the_time_may_be_larger_than_over_all_of_it(tmp_path: Path) -> None:
    requests = [
        request(0, "a", 0, 0, tuple(range(4))),
        request(1, "b", 0, 40, tuple(range(4, 14))),
        *(request(2 + i, tenant, 0, 200, (20,)) for i, tenant in enumerate("ab")),
    ]
    assert largest_gap(run_of(tmp_path / "run", requests), input_weight=0) == ServiceGap(20, "b", "a", 40, 140)
    halved = largest_gap(run_of(tmp_path / "again", requests), input_weight=0, weights={"b": 5})
    assert halved == ServiceGap(8, "a", "b", 0, 40)


def test_who_is_never_seen_waiting_beside_another_cannot_be_compared(tmp_path: Path) -> None:
    requests = [request(0, "a", 0, 10, (1,)), request(1, "b", 10, 20, (2,)), request(2, "c", 30, 30, (3,))]
    assert largest_gap(run_of(tmp_path / "run", requests)) is None
    assert largest_gap(run_of(tmp_path / "none", [])) is None


def test_who_is_refused_does_not_wait_and_who_gave_up_waited_until_then(tmp_path: Path) -> None:
    requests = [
        request(0, "a", 0, 0, tuple(range(9))),
        request(1, "a", 0, 90, (9,)),
        {**request(2, "b", 0, None, ()), "status": "refused"},
        {**request(3, "c", 0, None, ()), "status": "cancelled", "finish_ns": 35},
    ]
    assert largest_gap(run_of(tmp_path / "run", requests)) == ServiceGap(5 + 6, "a", "c", 0, 30)


@pytest.mark.parametrize("weight", [0, -1, float("nan")])
def test_a_weight_that_is_not_positive_is_refused(tmp_path: Path, weight: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        largest_gap(run_of(tmp_path / "run", []), weights={"a": weight})


def test_the_summary_has_it_where_there_are_tenants(tmp_path: Path) -> None:
    alone = run_of(tmp_path / "alone", [request(0, "a", 0, 0, (0, 1)), request(1, "a", 0, 20, (2,))])
    both = [request(0, "a", 0, 0, (0, 1)), request(1, "a", 0, 30, (3,)), request(2, "b", 0, 40, (4,))]
    two = run_of(tmp_path / "two", both)
    assert summarize(alone)["largest_service_gap"] is None
    assert summarize(two)["largest_service_gap"] == 5 + 4
    assert [(row.metric, row.a, row.b) for row in compare(alone, two).rows()][-1] == ("Service gap", "–", "9.000")
    assert "Service gap" not in [row.metric for row in compare(alone, alone).rows()]


def slow(run: Run, weights: dict[str, float]) -> float | None:
    """Every pair of tenants, every interval; from one time to the next come inputs, then tokens."""
    requests, events = run.requests, list(services(run, 1.0, 2.0).itertuples())
    end = max((e.t_ns for e in events), default=0)
    spans: dict[str, list[tuple[int, int]]] = {}
    for row in requests.itertuples():
        gone = [int(t) for t in (row.first_scheduled_ns, row.finish_ns) if not pd.isna(t)]
        spans.setdefault(row.tenant, []).append((row.arrival_ns, gone[0] if gone else end))
    times = sorted({t for of in spans.values() for span in of for t in span} | {e.t_ns for e in events})
    largest = None
    for pair in itertools.combinations(sorted(spans), 2):
        stretch: list[float] = []
        for now, after in itertools.pairwise(times):
            if not all(any(a <= now < b for a, b in spans[tenant]) for tenant in pair):
                stretch = []
                continue
            for is_input, at in ((True, now), (False, after)):
                given = dict.fromkeys(pair, 0.0)
                for e in events:
                    if e.tenant in pair and e.is_input == is_input and e.t_ns == at:
                        given[e.tenant] += e.service / weights.get(e.tenant, 1.0)
                stretch.append(given[pair[0]] - given[pair[1]])
            sums = (abs(sum(stretch[first:])) for first in range(len(stretch)))
            without_tokens = (abs(sum(stretch[first:-1])) for first in range(len(stretch)))
            largest = max(largest or 0.0, *sums, *without_tokens)
    return largest


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.sampled_from([{}, {"a": 2.0, "b": 0.5}]))
def test_it_is_what_trying_all_intervals_gives(
    tmp_path_factory: pytest.TempPathFactory, seed: int, num_tenants: int, weights: dict[str, float]
) -> None:
    run = fake_run(tmp_path_factory.mktemp("fair") / "run", random_requests(9, seed, cancelled=0.2))
    run.requests["tenant"] = ["abcd"[(i * 7 + seed) % num_tenants] for i in run.requests["request_id"]]
    run.requests["arrival_ns"] //= 2  # they wait longer
    gap, expected = largest_gap(run, weights=weights), slow(run, weights)
    assert (gap and gap.service) == (expected if expected is None else pytest.approx(expected))
