"""Service by tenant from the records, against an example by hand and a simulated run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from experiments.fairness import jain_index, service_difference, service_received
from tests.experiments.fake_run import fake_run, random_requests
from tests.experiments.test_metrics import MS, by_hand


def test_service_by_hand(tmp_path: Path) -> None:
    """Ten input tokens each; request 0 (a) gets tokens at 10, 20 and 30 ms, request 1 (b) at 30 and 40 ms."""
    run = by_hand(tmp_path / "run", tenant="a")
    run.requests.loc[run.requests["request_id"] == 1, "tenant"] = "b"
    run.requests.loc[run.requests["request_id"] > 1, "tenant"] = "c"
    service = service_received(run)
    assert service.columns.tolist() == ["a", "b", "c"]
    assert service.index.tolist() == [0, 10 * MS, 20 * MS, 30 * MS, 40 * MS]
    assert service["a"].tolist() == [10, 12, 14, 16, 16]
    assert service["b"].tolist() == [0, 0, 10, 12, 14]
    assert service["c"].tolist() == [0] * 5
    assert service_difference(run, ["a", "b"]).tolist() == [10, 12, 4, 4, 2]
    assert service_difference(run, ["a", "b"], input_weight=0, output_weight=1).tolist() == [0, 1, 2, 2, 1]
    assert service_difference(run).tolist() == [10, 12, 14, 16, 16]
    with pytest.raises(ValueError, match=r"there is no tenant 'x' in .*; it has 'a', 'b', 'c'"):
        service_difference(run, ["x"])


def test_in_the_end_service_is_all_that_was_computed_once(tmp_path: Path) -> None:
    """With preemptions, which compute again, and requests that were cancelled before or while they ran."""
    run = fake_run(tmp_path / "run", random_requests(40, 3, cancelled=0.3))
    requests = run.requests
    assert requests["preemptions"].sum() > 0
    ran = requests[requests["first_scheduled_ns"].notna()]
    assert 0 < len(ran) < len(requests)
    tokens = ran["prompt_tokens"].sum() + 2 * ran["output_tokens"].sum()
    assert service_received(run).iloc[-1].tolist() == [tokens]
    assert (service_difference(run) == 0).all()


@pytest.mark.parametrize(
    ("shares", "index"),
    [([3, 3, 3], 1.0), ([5, 0, 0, 0], 0.25), ([1, 2, 3], 36 / 42), ([7], 1.0)],
)
def test_jains_index(shares: list[float], index: float) -> None:
    assert jain_index(shares) == pytest.approx(index)


def test_of_nothing_there_is_no_index() -> None:
    assert math.isnan(jain_index([0, 0]))
