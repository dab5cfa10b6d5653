"""The serving benchmark runs to its end on the CPU, and what it says of figures and profiles is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import report
from benchmarks.gpu.lengths import cut, prepare, read_lengths
from benchmarks.gpu.online import poisson_ns
from benchmarks.gpu.profiling import Kernel, inner, span_and_busy, summary
from benchmarks.gpu.reference import MODELS, decode_floor_ms, metrics, prefill_floor_ms
from benchmarks.gpu.results import ROOT, rows, text_table

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n" + "\r\n".join(
    f"2023-11-16 18:15:{i:02}.1000000,{20 + i},{10 + i}" for i in range(20)
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def serve(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.gpu.serving", "--small", "--device", "cpu", "--models", "tiny"]
    environment = {**os.environ, "DIPTYCH_BENCH_OUT": str(out)}
    environment.pop("DIPTYCH_AZURE", None)
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return done, json.loads((out / "gpu-serving-tiny-small.json").read_text())


def result(model: str, figures: dict[str, float]) -> dict[str, Any]:
    return {
        "benchmark": "gpu_serving",
        "model": model,
        "small": False,
        "device": "a card",
        "software": {"torch": "2.11.0"},
        "date": "2026-11-25",
        "command": "python -m benchmarks.gpu.serving",
        "revision": "abc",
        "metrics": figures,
        "parts": {},
        "errors": {},
        "finished": True,
    }


def test_every_part_runs_on_the_cpu_and_leaves_its_figures(tmp_path: Path, trace: Path) -> None:
    done, found = serve(tmp_path, "--azure", str(trace))
    assert done.returncode == 0, done.stdout + done.stderr
    assert found["finished"]
    assert not found["errors"]
    assert found["lengths"] == "trace"
    assert list(found["parts"]) == ["startup", "online", "azure", "decode", "prefill", "offline", "idle"]
    keys = ("start_s", "decode_ms_b4", "prefill_ms_1x64", "offline8_out_tok_s", "azure_req_s", "online50_ttft_p99_ms")
    assert all(found["metrics"][key] > 0 for key in keys)
    assert "A small run" in done.stdout


def test_a_part_that_fails_is_noted_and_the_next_one_runs(tmp_path: Path) -> None:
    broken = tmp_path / "broken.csv"
    broken.write_text("no,trace\n1,2\n")
    done, found = serve(tmp_path, "--azure", str(broken), "--only", "prefill,azure")
    assert done.returncode == 1
    assert "no known trace" in found["errors"]["azure"]
    assert list(found["parts"]) == ["startup", "prefill"]
    assert found["finished"]


def test_lengths_are_the_traces_cut_or_else_generated(tmp_path: Path, trace: Path) -> None:
    small = tmp_path / "small.jsonl.gz"
    assert prepare(trace, small) == 20
    whole = read_lengths(trace, 30, 45)
    assert whole == read_lengths(small, 30, 45)
    assert whole[0][:2] == [(20, 10), (21, 11)]
    assert whole[0][-1] == (30, 15)
    generated, source = read_lengths(None, 3500, 4000)
    assert source == "generated"
    assert len(generated) == 1000
    assert cut(5000, 900, 3500, 4000) == (3500, 500)


def test_arrivals_have_the_rate_asked_for() -> None:
    times = poisson_ns(6, 300)
    assert times == sorted(times)
    assert 300 / 6 * 0.8 < times[-1] / 1e9 < 300 / 6 * 1.2


def test_idle_time_is_what_no_kernel_covers() -> None:
    kernels = [Kernel("a", 0, 10), Kernel("b", 5, 8), Kernel("a", 20, 30), Kernel("c", 29, 40)]
    assert span_and_busy(kernels) == (40, 30)
    found = summary(kernels, step_us=20)
    assert found["idle_percent"] == pytest.approx(25)
    assert found["steps"] == 2
    assert [one["name"] for one in found["top"]] == ["a", "c", "b"]
    assert found["top"][0]["total_us"] == 20
    assert [kernel.start for kernel in inner(kernels, 0.1)] == [5, 20, 29]
    assert "no work" in summary([])["note"]


def test_a_figure_is_better_in_its_own_direction_and_marked_by_its_target() -> None:
    found = result(MODELS[0], {"decode_ms_b1": 5.8, "offline256_out_tok_s": 9000.0, "odd": 1.0})
    table = {row[0]: row for row in rows(found)}
    assert table["decode step, batch 1"][2:] == ("5.80", "6.46", "1.11", "5.90", "4.85", "pass")
    assert table["offline256"][2:] == ("9,000", "8,376", "1.07", "9,300", "10,806", "MISS")
    assert table["odd"][3:] == ("", "", "", "", "")
    assert "MISS" in text_table(found)


@pytest.mark.parametrize("model", MODELS)
def test_no_target_or_figure_of_vllm_is_better_than_the_floor(model: str) -> None:
    keys = [metric.key for metric in metrics(model)]
    assert len(keys) == len(set(keys))
    for metric in metrics(model):
        if metric.floor is not None:
            known = metric.target or metric.vllm
            assert known is not None
            assert metric.floor > known if metric.higher_is_better else metric.floor < known
    assert decode_floor_ms("llama-3.1-8b", 256) == pytest.approx(11.04, abs=0.01)
    assert prefill_floor_ms("llama-3.1-8b", 2048) == pytest.approx(37.6, abs=0.1)  # 36.2 of products, 1.4 of attention


def test_the_report_replaces_what_stands_between_its_markers(tmp_path: Path) -> None:
    first, second = result(MODELS[1], {"decode_ms_b1": 2.0, "start_s": 20.0}), result(MODELS[1], {"decode_ms_b1": 1.2})
    text = report.generated([first, second])
    assert "1.20" in text
    assert "2.00" not in text
    assert "20.00" in text
    document = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    changed = report.insert(document, text)
    assert changed.startswith("before\n")
    assert changed.endswith("after\n")
    assert "old" not in changed
    assert report.insert(changed, text) == changed
    with pytest.raises(ValueError, match="has no lines"):
        report.insert("nothing", text)
    assert report.BEGIN in (ROOT / "docs/performance.md").read_text()
