"""What a replica can hold and run: figures that make no sense are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from policies.replica_state import Limits


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_blocks": 0}, "num_blocks must be at least 1, not 0"),
        ({"max_num_seqs": -1}, "max_num_seqs must be at least 1, not -1"),
        ({"lag": 2}, "lag must be 0 or 1, not 2"),
        ({"plan_lead_ns": -1}, "plan_lead_ns must be at least 0, not -1"),
        ({"num_host_blocks": -1}, "num_host_blocks must be at least 0, not -1"),
        ({"num_disk_blocks": 8}, "num_disk_blocks needs num_host_blocks and prefix_caching"),
        (
            {"num_disk_blocks": 8, "num_host_blocks": 8, "prefix_caching": False},
            "num_disk_blocks needs num_host_blocks and prefix_caching",
        ),
        ({"capture_sizes": (1, 4, 2)}, r"capture_sizes must ascend, not \(1, 4, 2\)"),
        ({"mixed_capture_sizes": (64, 64)}, r"mixed_capture_sizes must ascend, not \(64, 64\)"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused_by_its_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits(**{"num_blocks": 100, **given})


def test_the_longest_sequence_is_the_models_or_what_memory_holds() -> None:
    assert Limits(100, 16, max_model_len=4096).max_total_tokens == 1600
    assert Limits(100, 16, max_model_len=512).max_total_tokens == 512
