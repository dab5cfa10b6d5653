"""A profile of a real runtime, and what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from experiments.profiling import profile
from experiments.refitting import refit
from experiments.spec import check_spec


def test_a_profile_prices_what_prefix_caching_costs_the_host_and_keeps_the_steps_that_say_so(tmp_path: Path) -> None:
    spec = check_spec(
        {
            "workload": {"name": "fixed", "n": 1},
            "model": {"source": "tiny", "load_format": "dummy"},
            "limits": {"num_blocks": 2000, "max_num_seqs": 6, "max_num_batched_tokens": 256, "max_model_len": 800},
        }
    )
    shares: list[float] = []
    fitted = profile(spec, seconds=10, on_progress=shares.append, steps_to=tmp_path / "calibration.parquet")
    assert shares == sorted(shares)
    assert shares[-1] == 1
    lookups = fitted.calibration.lookups
    assert lookups is not None
    assert lookups.named_blocks + lookups.looked_up_blocks + lookups.num_named > 0
    steps = pd.read_parquet(tmp_path / "calibration.parquet")
    cached, uncached = steps[steps["replica"] == 1], steps[steps["replica"] == 0]
    assert cached["end_ns"].max() < uncached["plan_ns"].min()
    assert cached["looked_up_blocks"].sum() > 0
    assert (cached["looked_up_blocks"] * 16 > cached["chunk_tokens"]).any(), "there were hits"
    assert not uncached[["num_named", "named_blocks", "looked_up_blocks"]].any(axis=None)
    fitted.save(tmp_path / "calibration.json")
    kept = json.loads((tmp_path / "calibration.json").read_text())
    assert kept["provenance"]["serving_from_ns"] > uncached["plan_ns"].min()
    assert refit(tmp_path / "calibration.json").calibration == fitted.calibration
