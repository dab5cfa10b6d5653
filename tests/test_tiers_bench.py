"""The benchmark of the host tier runs to its end on the CPU, both panels, and says of its figures what holds."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import tiers


def test_every_part_runs_and_replays_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = replace(tiers.QUICK, profile_s=1.0, turns=2, swapped=(6, 40, 30))
    monkeypatch.setattr(tiers, "MORE_TURNS", {})
    monkeypatch.setattr(tiers, "TURNS", {"write_back": tiers.TURNS["write_back"]})
    monkeypatch.setattr(tiers, "SWAPS", {w: tiers.SWAPS[w] for w in ("swap",)})
    monkeypatch.setattr(tiers, "OFFLOADS", ("write_back",))
    monkeypatch.setattr(tiers, "rate_without", lambda sizes, cost: 30.0)
    result: dict[str, Any] = {"model": "tiny", "device": "cpu", "torch": "2", "revision": "abc", "gb_s": {}}
    kept: list[str] = []
    bench = tiers.Bench(sizes, "cpu", time.monotonic() + 300, result)
    try:
        bench.run_all(lambda: kept.append(tiers.table(result)))
    finally:
        bench.close()
    assert all(result["tokens"]["same"].values())
    assert result["tokens"]["fetched_tokens"]["write_back"] > 0
    runs = [*result["turns"].values(), *result["swaps"].values()]
    assert [run["divergence"] for run in runs] == [None] * 2
    assert all(run["simulated"]["duration"] > 0 for run in runs)
    assert result["turns"]["write_back"]["real"]["offloaded_blocks"] > 0
    assert result["swaps"]["swap"]["real"]["swapped_blocks_out"] > 0
    assert "| turns write_back | simulated |" in kept[-1]


def test_with_a_disk_the_conversations_are_run_with_a_small_host_and_a_disk_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = replace(tiers.QUICK, profile_s=1.0, turns=2, link_blocks=())
    monkeypatch.setattr(tiers, "OFFLOADS", ("write_through",))
    monkeypatch.setattr(tiers, "DISK", {"host and disk": ({"offload": "write_through,fetch=always"}, True)})
    monkeypatch.setattr(tiers, "rate_without", lambda sizes, cost: 40.0)
    result: dict[str, Any] = {"model": "tiny", "device": "cpu", "torch": "2", "revision": "abc", "gb_s": {}}
    kept: list[str] = []
    bench = tiers.Bench(sizes, "cpu", time.monotonic() + 300, result, str(tmp_path))
    try:
        bench.run_all(lambda: kept.append(tiers.table(result)))
    finally:
        bench.close()
    assert all(result["tokens"]["same"].values())
    assert result["tokens"]["disk_tokens"]["disk, write_through"] > 0
    assert [run["divergence"] for run in result["disk"].values()] == [None]
    found = result["disk"]["host and disk"]["real"]
    assert found["disk_blocks_out"] > 0
    assert found["disk_token_share"] > 0
    assert "| disk host and disk | simulated |" in kept[-1]


def test_conversations_take_turns_and_repeat_their_history_and_nobody_elses() -> None:
    work = tiers.conversations(tiers.FULL, 6.0)
    assert len(work) == 24 * 5
    assert work.session is not None
    assert work.hash_ids is not None
    assert np.array_equal(work.session[:25], [*range(24), 0])
    assert work.hash_ids[24][:64] == work.hash_ids[0]
    assert not set(work.hash_ids[0]) & set(work.hash_ids[1])
    assert int(work.prompt_tokens[-1]) == 4096 + 4 * 128


def test_what_holds_is_said_of_what_was_measured_alone() -> None:
    def run(**figures: float) -> dict[str, Any]:
        return {"real": figures, "divergence": None, "error": {}}

    result: dict[str, Any] = {"tokens": {"same": {"swapped": True}}, "gb_s": {"64 blocks": {"out": 44.3, "in": 30.0}}}
    assert list(tiers.verdicts(result).values()) == [True, True, None, None, None, None]
    result["turns"] = {"none": run(mean_ttft_ms=100.0), "write_back": run(mean_ttft_ms=51.0)}
    result["swaps"] = {
        name: run(output_throughput=speed) for name, speed in (("recompute", 90.0), ("swap", 100.0), ("cheapest", 98.0))
    }
    assert list(tiers.verdicts(result).values()) == [True, True, False, True, True, True]
    result["swaps"]["cheapest"] = {**run(output_throughput=97.9), "divergence": "step 3"}
    assert list(tiers.verdicts(result).values())[-2:] == [False, False]


def test_the_table_has_a_dash_for_what_nothing_is_known_of(tmp_path: Path) -> None:
    result = {"model": "m", "device": "d", "torch": "2", "revision": "r", "tokens": {"same": {}}, "gb_s": {}}
    assert "| swapping beats recomputing | – |" in tiers.table(result)
