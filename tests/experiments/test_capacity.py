"""Capacity: the search against closed forms, the simulator against the recursion, and whether a queue held."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.capacity.objectives import parse_objectives
from experiments.capacity.search import Probe, find, rounded
from experiments.capacity.stability import drift, drift_of
from experiments.records import Run
from experiments.spec import SpecError
from experiments.sweeps.spec import Window
from experiments.workloads import WorkloadSpec, make_workload
from tests.experiments.command import diptych
from tests.experiments.rows import write_run

STEP_MS, SERVICE_NS = 10.0, 10_000_000
LIMIT_MS = 30.0
MD1 = 80.0
"""Requests a second at which the mean TTFT of M/D/1 with a service of 10 ms is 30 ms: a wait of 20 ms is
rho S / (2 (1 - rho)) at rho = 0.8."""


def starts_ns(arrival_ns: np.ndarray) -> np.ndarray:
    """When one server with constant service begins each, by Lindley's recursion."""
    work = np.arange(len(arrival_ns)) * SERVICE_NS
    return np.maximum.accumulate(arrival_ns - work) + work


def mean_ttft_ms(arrival_ns: np.ndarray, skip: float = 0.0) -> float:
    waits = starts_ns(arrival_ns) - arrival_ns
    return float(np.mean(waits[int(skip * len(arrival_ns)) :]) / 1e6 + STEP_MS)


def test_the_capacity_of_md1_is_that_of_its_closed_form() -> None:
    gaps = np.random.default_rng(1).exponential(1.0, 400_000)
    times = np.cumsum(gaps / gaps.mean())  # the sample's rate is exactly the one that is meant

    def ask(rate: float) -> Probe:
        arrivals = np.rint(times / rate * 1e9).astype(np.int64)
        return Probe(rate, (mean_ttft_ms(arrivals) / LIMIT_MS,), rate < 100, served=None if rate < 100 else 100.0)

    for start in (5.0, 79.0, 1280.0):
        found = find(ask, start)
        assert len(found.probes) <= 12
        assert found.low is not None
        assert found.width <= 0.01
        assert found.low == pytest.approx(MD1, rel=0.01)


def test_the_capacity_of_a_steady_stream_is_the_servers_rate() -> None:
    """Without any limit but that the queue holds: a service of 10 ms, so 100 requests a second."""

    def ask(rate: float) -> Probe:
        arrivals = np.rint(np.arange(3000) / rate * 1e9).astype(np.int64)
        grown = drift_of(arrivals, starts_ns(arrivals) + SERVICE_NS, Window(skip_first=0.1))
        stable = grown.stable(0.005)
        return Probe(rate, (0.0,), stable, served=None if stable else rate * (1 - grown.share))

    for start in (7.0, 100.0, 1500.0):
        found = find(ask, start)
        assert len(found.probes) <= 12
        assert found.low == pytest.approx(100.0, rel=0.01)
        assert found.width <= 0.01


MD1_FLAGS = [
    *("-w", "fixed", "--set", "workload.prompt_tokens=1", "--set", "workload.output_tokens=1"),
    *("--set", "cost.kind=constant", "--set", f"cost.step_ms={STEP_MS}", "--set", "limits.max_num_seqs=1"),
    *("--set", "limits.num_blocks=100", "--set", "limits.lag=0", "--set", "decisions=false"),
]


def test_the_simulators_capacity_is_lindleys_probe_by_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the same arrivals, with the same warm-up left out: the same rates are tried and the same one is found. What is
    there already is not run again."""
    from experiments.cli import capacity as command
    from tests.experiments.test_sweeps import Here

    here = Here()
    monkeypatch.setattr(command, "LocalRunner", lambda processes: _Within(here))
    spec = WorkloadSpec(name="fixed", n=200, prompt_tokens=1, output_tokens=1, rate=1.0)

    def ask(rate: float) -> Probe:
        arrivals = make_workload(spec.model_copy(update={"rate": rate})).arrival_ns
        grown = drift_of(arrivals, starts_ns(arrivals) + SERVICE_NS, Window(skip_first=0.1))
        stable = grown.stable(0.1 / 2)
        served = None if stable else rate * (1 - grown.share)
        return Probe(rate, (mean_ttft_ms(arrivals, 0.1) / LIMIT_MS,), stable, served=served)

    monkeypatch.chdir(tmp_path)
    flags = [*MD1_FLAGS, "-n", "200", "--rate", "70", "--slo", "mean_ttft:30", "--tolerance", "0.1", "-o", "found"]
    status, out, _ = diptych(monkeypatch, capsys, "capacity", *flags)
    assert status == 0
    answer = json.loads(Path("found/capacity.json").read_text())["answers"]["sim"]
    expected = find(ask, 70.0, tolerance=0.1)
    assert [probe["rate"] for probe in answer["probes"]] == [probe.rate for probe in expected.probes]
    assert [probe["loads"][0] for probe in answer["probes"]] == pytest.approx([p.loads[0] for p in expected.probes])
    assert (answer["low"], answer["high"]) == (expected.low, expected.high)
    assert f"capacity {expected.low:g} requests/s for mean_ttft 30 ms" in out
    ran = len(here.ran)
    diptych(monkeypatch, capsys, "capacity", *flags)
    assert len(here.ran) == ran


class _Within:
    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def __enter__(self) -> Any:
        return self.runner

    def __exit__(self, *_: object) -> None: ...


@settings(max_examples=60)
@given(
    capacity=st.floats(0.01, 1000),
    start=st.floats(0.01, 1000),
    slope=st.floats(0.1, 8),
    wall=st.floats(1.0, 3.0),
    deaf=st.booleans(),
    error=st.floats(-0.03, 0.03),
)
def test_any_rising_load_is_met_to_one_percent_within_twelve_probes(
    capacity: float, start: float, slope: float, wall: float, deaf: bool, error: float
) -> None:
    """Whatever its shape, also where it says nothing (deaf) but that the queue grows, and roughly what is served."""
    start = min(max(start, capacity / 16), capacity * 16)
    edge = capacity if deaf else wall * capacity

    def ask(rate: float) -> Probe:
        relative = rate / capacity
        load = 0.5 if deaf and relative <= 1 else relative**slope * (1 + max(0.0, relative - wall) * 50)
        return Probe(rate, (load,), rate <= edge, served=None if rate <= edge else edge * (1 + error))

    found = find(ask, start)
    assert len(found.probes) <= 12
    assert found.low is not None
    assert found.high is not None
    assert found.low <= capacity * (1 + 1e-5)
    assert found.high >= capacity * (1 - 1e-5)
    assert found.width <= 0.0102


def test_what_no_rate_meets_and_what_every_rate_meets_are_said() -> None:
    never = find(lambda rate: Probe(rate, (2.0,)), 4.0)
    assert (never.low, never.high, len(never.probes)) == (None, rounded(4.0 / 2**15), 5)
    always = find(lambda rate: Probe(rate, (0.5,)), 4.0)
    assert (always.low, always.high) == (4.0 * 2**15, None)


def test_seeds_give_an_interval_of_the_capacity() -> None:
    """Loads of 0.9, 1 and 1.1 times rate / 50: t(0.975, 2) 0.1 / sqrt(3) = 0.2484 to either side."""
    found = find(lambda rate: Probe(rate, tuple(factor * rate / 50 for factor in (0.9, 1.0, 1.1))), 20.0)
    low, high = found.confident
    assert low == pytest.approx(50 / 1.2484, rel=0.02)
    assert high == pytest.approx(50 / 0.7516, rel=0.02)
    assert find(lambda rate: Probe(rate, (rate / 50,)), 30.0).confident == (None, None)


def constant_service(folder: Path, rate: float, service_s: float, count: int) -> Run:
    """One server, a request after another."""
    end, rows = 0.0, []
    for i, at in enumerate(np.arange(1, count + 1) / rate):
        end = max(end, at) + service_s
        rows.append({"request_id": i, "arrival_ns": round(at * 1e9), "finish_ns": round(end * 1e9), "status": "length"})
    return write_run(folder, rows, [])


@pytest.mark.parametrize(("load", "stable"), [(0.9, True), (1.0, True), (1.01, False), (1.5, False)])
def test_a_steady_stream_is_stable_up_to_the_servers_rate(load: float, stable: bool, tmp_path: Path) -> None:
    found = drift(constant_service(tmp_path / "run", 10 * load, 0.1, 2000), Window(skip_first=0.1))
    assert found.stable(0.005) == stable
    assert found.share == pytest.approx(max(0.0, 1 - 1 / load), abs=0.001)


@pytest.mark.parametrize(("load", "stable"), [(0.5, True), (0.8, True), (0.9, True), (1.2, False)])
def test_a_random_stream_that_is_served_in_time_is_not_called_unstable(load: float, stable: bool) -> None:
    times = np.cumsum(np.random.default_rng(3).exponential(0.01 / load, 3000))
    arrivals = np.rint(times * 1e9).astype(np.int64)
    found = drift_of(arrivals, starts_ns(arrivals) + SERVICE_NS, Window(skip_first=0.1))
    assert found.stable(0.005) == stable


def test_a_short_burst_is_not_called_a_growing_queue(tmp_path: Path) -> None:
    """Of servers without end, whose number in the system is random: over many short runs next to none."""
    called = 0
    for seed in range(100):
        arrivals = np.cumsum(np.random.default_rng(seed).exponential(1.0, 60))
        found = drift_of(
            np.rint(arrivals * 1e9).astype(np.int64),
            np.rint((arrivals + 3) * 1e9).astype(np.int64),
            Window(skip_first=0.1),
        )
        called += not found.stable(0.005)
    assert called <= 2


def test_limits_are_shares_of_a_figure() -> None:
    ttft, tpot, goodput = parse_objectives(["p99_ttft:200", "tpot:50", "goodput:0.9"])
    figures = {"p99_ttft_ms": 100.0, "p99_tpot_ms": 75.0}
    figures |= {"request_goodput": 8.0, "duration": 10.0, "num_prompts": 100.0}
    assert (ttft.load(figures), tpot.load(figures)) == (0.5, 1.5)
    assert goodput.load(figures) == pytest.approx(2.0)  # a fifth misses, where a tenth may
    assert math.isinf(ttft.load({"p99_ttft_ms": None}))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("ttft", "write a limit in ms"),
        ("p98_ttft:5", "give one of mean, median, p50, p90, p95, p99"),
        ("p99_tttf:5", "there is no 'p99_tttf'"),
        ("goodput:2", "above 0 and at most 1"),
        ("ttft:-1", "above 0"),
    ],
)
def test_limits_that_mean_nothing_are_refused(text: str, what: str) -> None:
    with pytest.raises(SpecError, match=what):
        parse_objectives([text])


def test_a_search_begins_at_one_where_nothing_completes_and_says_that_no_rate_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--set", "limits.max_model_len=16", "--probes", "2"]
    status, out, err = diptych(
        monkeypatch, capsys, "capacity", "-w", "chat", "-n", "20", "--slo", "p99_ttft:500", *short
    )
    assert status == 1, err
    assert out.splitlines()[0].split()[1] == "1"
