"""Replica seconds, energy and money of a simulated run, worked by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.compare import compare
from experiments.economy import economy, replica_seconds
from experiments.metrics import outline, summarize
from experiments.records import RunWriter, read_run
from experiments.simulated import run_simulated
from experiments.spec import check_spec
from simulator.devices import DEVICES, Device, device_like
from tests.experiments.command import diptych

S = 1_000_000_000
SMALL = {
    "target": "sim",
    "workload": {"name": "chat", "n": 20, "rate": 20, "length_scale": 0.05},
    "limits": {"num_blocks": 200, "max_model_len": 1024},
}


def run_of(folder: Path, **more: Any):
    run_simulated(check_spec({**SMALL, **more}), folder)
    return read_run(folder)


def test_power_rises_from_idle_to_the_most_with_the_time_that_a_device_is_busy() -> None:
    sheet = Device("d", 1e12, 1e12, 1e12, 1, 1e9, tdp_w=500, idle_w=100)
    assert sheet.energy_j(10, 0) == 1_000
    assert sheet.energy_j(10, 10) == 5_000
    assert sheet.energy_j(10, 4) == 100 * 10 + 400 * 4
    assert Device("d", 1e12, 1e12, 1e12, 1, 1e9, tdp_w=500).energy_j(10, 0) == 500  # a tenth
    assert Device("d", 1e12, 1e12, 1e12, 1, 1e9).energy_j(10, 4) is None
    assert [DEVICES[name].tdp_w for name in ("h100-sxm", "h200", "a100-80gb", "l4")] == [700, 700, 400, 72]


def test_energy_and_money_follow_from_the_steps_and_the_price_and_the_number_of_devices(tmp_path: Path) -> None:
    cost = {"device": "h100-sxm", "tensor_parallel": 2}
    run = run_of(tmp_path / "run", cost=cost, price_per_hour=3.6, replicas=3)
    end_s = max(run.steps["end_ns"].max(), run.requests["finish_ns"].max()) / S
    busy_s = run.steps["device_ns"].sum() / S
    summary = summarize(run)
    tokens = summary["total_output_tokens"]
    assert summary["replica_seconds"] == pytest.approx(3 * end_s)
    assert summary["busy_share"] == pytest.approx(busy_s / (3 * end_s))
    joule = 2 * (70 * 3 * end_s + 630 * busy_s)
    assert summary["estimated_joule_per_output_token"] == pytest.approx(joule / tokens)
    money = 2 * 3 * end_s * 0.001
    assert summary["estimated_price_per_million_output_tokens"] == pytest.approx(1e6 * money / tokens)
    assert economy(run, outline(run)["total_output_tokens"]).items() <= summary.items()


def test_each_pool_has_its_device_and_its_price(tmp_path: Path) -> None:
    pools = [{"name": "a", "device": "l4", "price_per_hour": 1}, {"name": "b", "device": "h200", "replicas": 2}]
    run = run_of(tmp_path / "run", pools=pools, price_per_hour=4)
    end_s = max(run.steps["end_ns"].max(), run.requests["finish_ns"].max()) / S
    busy = run.steps.groupby("replica")["device_ns"].sum() / S
    joule = DEVICES["l4"].energy_j(end_s, busy[0]) + DEVICES["h200"].energy_j(2 * end_s, busy[1] + busy[2])
    summary = summarize(run)
    tokens = summary["total_output_tokens"]
    assert summary["estimated_joule_per_output_token"] == pytest.approx(joule / tokens)
    money = end_s * (1 + 4 + 4) / 3600
    assert summary["estimated_price_per_million_output_tokens"] == pytest.approx(1e6 * money / tokens)


def test_without_a_data_sheet_or_a_price_there_is_no_estimate(tmp_path: Path) -> None:
    summary = summarize(run_of(tmp_path / "run", cost={"kind": "constant", "step_ms": 1.0}))
    assert summary["estimated_joule_per_output_token"] is None
    assert summary["estimated_price_per_million_output_tokens"] is None
    assert summary["replica_seconds"] > 0


EVENTS = [(0, 0, "serve"), (1, 1, "start"), (2, 1, "serve"), (3, 1, "drain"), (4, 1, "stop"), (5, 2, "start"),
          (6, 2, "fail"), (9, 3, "start"), (11, 3, "serve")]  # fmt: skip
"""Tenths of a run, replica, what happens to it."""


def test_a_replica_is_up_from_when_it_is_asked_for_until_it_stops_or_the_run_ends(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "run", pools=[{"name": "a"}])
    end_s = max(whole.steps["end_ns"].max(), whole.requests["finish_ns"].max()) / S
    tenth = round(end_s * S / 10)
    with RunWriter(tmp_path / "changed", whole.info, replicas=True) as writer:
        for row in whole.table("steps").to_pylist():
            writer.step(tuple(row.values()))
        for row in whole.table("requests").to_pylist():
            writer.request(tuple(row.values()))
        for at, replica, event in EVENTS:
            writer.replica_changed(at * tenth, replica, "a", event)
    seconds = replica_seconds(read_run(tmp_path / "changed"))
    assert seconds == pytest.approx({0: end_s, 1: 0.3 * end_s, 2: 0.1 * end_s, 3: 0.1 * end_s}, rel=1e-6)


def test_drivers_names_of_cards_are_known() -> None:
    names = [
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H200",
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA L4",
        "NVIDIA H100 PCIe",
        "TITAN V",
    ]
    found = [device_like(name) for name in names]
    assert [None if d is None else d.name for d in found] == ["h100-sxm", "h200", "a100-80gb", "l4", None, None]


def test_summary_and_comparison_mark_them_as_estimates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "simulate -w chat -n 8 --rate 9 --set workload.length_scale=0.05 --set limits.num_blocks=200"
    price = ("--set", "price_per_hour=2.5")
    status, out, _ = diptych(monkeypatch, capsys, *words.split(), *price, "-o", str(tmp_path / "run"))
    text = " ".join(out.split())
    assert status == 0
    assert "J an output token (estimate)" in text
    assert "for a million output tokens at the price given (estimate)" in text
    run = read_run(tmp_path / "run")
    metrics = [row.metric for row in compare(run, run).rows()]
    assert {"Energy (estimate)", "Price (estimate)"} <= set(metrics)
