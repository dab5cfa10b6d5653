"""What the device did over time is added up from every step, at any zoom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.composition import KINDS, composition
from experiments.records import Run
from experiments.timeline import timeline, window
from tests.experiments.fake_run import fake_run, random_requests


@pytest.fixture(scope="module", params=[0, 1], ids=["lag 0", "lag 1"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fake_run(tmp_path_factory.mktemp("steps") / "run", random_requests(60, seed=5), lag=request.param)


def slow_share(run: Run, kind: str, begin: float, end: float) -> float:
    """One span of one kind, step by step."""
    busy, before = 0.0, 0
    for row in run.steps.itertuples():
        if not row.num_decodes and not row.num_chunks:
            continue
        is_kind = "mixed" if row.num_decodes and row.num_chunks else "decode" if row.num_decodes else "prefill"
        start, before = max(row.launch_ns, before), row.end_ns
        if is_kind == kind:
            busy += max(0.0, min(end, row.end_ns) - max(begin, start))
    return busy / (end - begin)


@settings(max_examples=25)
@given(data=st.data())
def test_every_span_is_what_its_steps_took(run: Run, data: st.DataObject) -> None:
    last = int(run.steps["end_ns"].max())
    begin = data.draw(st.integers(0, last - 1))
    end = data.draw(st.integers(begin + 10, last + 1000))
    frame = composition(run, begin, end, spans=5)
    edges = np.linspace(begin, end, 6)
    for at in range(5):
        for kind in ("decode", "mixed", "prefill"):
            assert frame[kind][at] == pytest.approx(slow_share(run, kind, edges[at], edges[at + 1]), abs=1e-6)
    assert np.allclose(frame[list(KINDS)].sum(axis=1), 1.0)


def test_preemptions_are_all_counted_however_wide_the_spans(run: Run) -> None:
    last = int(run.steps["end_ns"].max()) + 1
    total = int(run.steps["num_preempted"].sum())
    assert total > 0
    for spans in (1, 7, 600):
        assert composition(run, 0, last, spans)["preemptions"][:-1].sum() == total


@given(data=st.data())
def test_a_window_holds_what_the_timeline_holds(run: Run, data: st.DataObject) -> None:
    frame = timeline(run)
    times = frame["t_ns"].to_numpy()
    begin = data.draw(st.integers(0, int(times[-1]) - 1))
    end = data.draw(st.integers(begin + 1, int(times[-1]) + 1000))
    part = window(frame, begin, end)
    if end <= times[0]:
        assert not len(part)
        return
    assert part["t_ns"].iloc[0] == max(begin, times[0])
    assert part["t_ns"].iloc[-1] == min(end, times[-1])
    for t_ns, running in zip(part["t_ns"][:-1], part["running"][:-1], strict=True):
        assert running == frame["running"][np.searchsorted(times, t_ns, side="right") - 1]


def test_a_window_beyond_the_end_is_empty(run: Run, tmp_path: Path) -> None:
    frame = timeline(run)
    assert not len(window(frame, int(frame["t_ns"].iloc[-1]), int(frame["t_ns"].iloc[-1]) + 5))
