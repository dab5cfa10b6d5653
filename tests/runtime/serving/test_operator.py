"""What an operator does to a live server: swap policies under load, pause, drain, flush, and read the record."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from experiments.divergence import diff_decisions
from experiments.records import Run, read_run
from experiments.replaying import replay_run
from experiments.timeline import check_books
from tests.runtime.serving.disconnecting import Client
from tests.runtime.serving.running import OPERATOR, Running, running, wait_until

LIMITS = {"num_blocks": 60, "max_num_seqs": 6, "max_num_batched_tokens": 64, "max_model_len": 300}
SWAPS = [
    {"scheduler": "sarathi,chunk_size=48"},
    {"queue": "priority"},
    {"scheduler": "prefill_first", "queue": "fcfs", "admission": "reserve_max"},
    {"eviction": "lru", "preemption": "last_admitted"},
    {"scheduler": "static,max_batch_size=3"},
    {"scheduler": "mixed", "admission": "watermark"},
]


def _bodies(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [7] * (16 * (i % 5)) + [i % 480] * (3 + i % 60),
            "max_tokens": 4 + i % 70,
            "seed": i,
            "priority": i % 3,
            "n": 1 + (i % 9 == 0),
            "stop": ["e", "th"] if i % 4 == 0 else None,
            "stream": i % 2 == 0,
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def recorded(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in which every policy is swapped under load, with clients that leave and texts that stop."""
    folder = tmp_path_factory.mktemp("swaps") / "run"
    with running(model_folder, "--check", "-o", str(folder), **LIMITS) as server:
        with ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(server.http.post, "/v1/completions", json=body) for body in _bodies(150)]
            for i, swap in enumerate(SWAPS):
                wait_until(lambda i=i: sum(a.done() for a in answers) >= 20 * (i + 1), "the load goes on")  # type: ignore[misc]
                leaving = Client(server, {"prompt": [9] * 40, "max_tokens": 250, "ignore_eos": True})
                result = server.operate("/admin/policies", swap)
                assert all(result["stack"][role] == policy for role, policy in swap.items())
                if i % 2:
                    server.operate("/admin/pause")
                    server.operate("/admin/flush_prefix_cache")
                    server.operate("/admin/resume")
                leaving.leave()
            statuses = [answer.result().status_code for answer in answers]
        assert statuses == [200] * 150
        assert server.info()["engines"][0]["stack"]["scheduler"] == "mixed"
        wait_until(lambda: server.info()["live"] == 0, "everybody has ended")
        assert server.num_blocks_held() == 0
    return read_run(folder)


def test_no_request_is_lost_and_the_books_balance(recorded: Run) -> None:
    assert recorded.complete
    statuses = recorded.requests["status"].value_counts()
    assert statuses["stop"] + statuses["length"] == 150 + 17  # two continuations for each ninth prompt
    assert statuses["cancelled"] == len(SWAPS)
    assert set(statuses.index) <= {"stop", "length", "cancelled"}
    check_books(recorded)


def test_the_record_says_before_which_step_what_was_swapped(recorded: Run) -> None:
    swaps = recorded.decisions[recorded.decisions["kind"] == "swap"]
    said = [dict(part.split(": ", 1) for part in reason.split("; ")) for reason in swaps["reason"]]
    assert said == SWAPS
    assert swaps["step"].is_monotonic_increasing
    kinds = recorded.decisions["kind"].value_counts()
    assert kinds["hold"] == kinds["release"] == kinds["flush"] == 3


def test_texts_that_stopped_are_recorded_as_stopped_before_a_step(recorded: Run) -> None:
    by_text = recorded.requests[(recorded.requests["status"] == "stop") & recorded.requests["end_before_step"].notna()]
    assert len(by_text) > 5
    assert (by_text["output_tokens"] > 0).all()


def test_a_replay_makes_every_decision_again(recorded: Run, tmp_path: Path) -> None:
    replay_run(recorded, tmp_path / "replay", check=True)
    replayed = read_run(tmp_path / "replay")
    assert diff_decisions(recorded, replayed) is None
    assert len(recorded.decisions) > 1000
    check_books(replayed)


def test_a_swap_decides_from_the_next_step_on(server: Running) -> None:
    """A long prompt is computed in chunks of the size that the newest scheduler allows."""
    chunks = {}
    for size in (32, 80):
        step = server.operate("/admin/policies", {"scheduler": f"sarathi,chunk_size={size}"})["before_step"]
        assert server.http.post("/v1/completions", json={"prompt": [size] * 400, "max_tokens": 1}).status_code == 200
        rows = server.record("decisions", step)
        assert [row["reason"] for row in rows if row["kind"] == "swap"] == [f"scheduler: sarathi,chunk_size={size}"]
        chunks[size] = max(row["tokens"] for row in rows if row["kind"] == "chunk")
    server.operate("/admin/policies", {"scheduler": "mixed"})
    assert chunks == {32: 32, 80: 80}


def test_a_pause_stops_the_steps_and_a_resume_goes_on_where_it_was(server: Running) -> None:
    body = {"prompt": "Hello", "max_tokens": 400, "ignore_eos": True, "seed": 4}
    undisturbed = server.http.post("/v1/completions", json=body).json()["choices"]
    paused = Client(server, body)
    wait_until(lambda: server.info()["engines"][0]["running"] == 1, "it runs")
    server.operate("/admin/pause")
    steps = server.info()["engines"][0]["steps"]["count"]
    threading.Event().wait(0.3)
    assert server.info()["engines"][0]["steps"]["count"] <= steps + 1  # the one in flight
    server.operate("/admin/resume")
    assert paused.json()["choices"] == undisturbed


def test_a_drain_refuses_newcomers_and_serves_who_is_there(server: Running) -> None:
    there = Client(server, {"prompt": "Hello", "max_tokens": 300, "ignore_eos": True})
    wait_until(lambda: server.info()["live"] == 1, "it is taken")
    assert server.operate("/admin/drain")["live"] == 1
    refused = server.http.post("/v1/completions", json={"prompt": "Hello"})
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "5"
    assert there.status() == 200
    server.operate("/admin/undrain")
    assert server.http.post("/v1/completions", json={"prompt": "Hello"}).status_code == 200


def test_a_flush_forgets_what_was_cached(server: Running) -> None:
    body = {"prompt": [3] * 100, "max_tokens": 1}

    def cached() -> int:
        usage = server.http.post("/v1/completions", json=body).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    server.operate("/admin/flush_prefix_cache")
    assert [cached(), cached()] == [0, 96]
    assert server.operate("/admin/flush_prefix_cache")["blocks"] >= 6
    assert cached() == 0


def test_metrics_and_settings_add_up(server: Running) -> None:
    done, tokens = (server.metric(f"vllm:{name}_total") for name in ("request_success", "generation_tokens"))
    answers = [
        server.http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 5, "ignore_eos": True, "n": 2})
        for _ in range(3)
    ]
    assert all(answer.status_code == 200 for answer in answers)
    assert server.metric("vllm:request_success_total") == done + 6
    assert server.metric("vllm:generation_tokens_total") == tokens + 30
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:time_to_first_token_seconds_count") >= 6
    steps = server.info()["engines"][0]["steps"]
    assert 0 < steps["host_us_by_part"]["plan"] < steps["host_us"]
    assert steps["device_us"] > 0


def test_what_cannot_be_swapped_changes_nothing(server: Running) -> None:
    before = server.info()["engines"][0]["stack"]
    for body in ({"scheduler": "sarathi,chunk_size=0"}, {"admission": "nonesuch"}, {"router": "round_robin"}):
        assert server.http.post("/admin/policies", json=body, headers=OPERATOR).status_code == 400
    assert server.info()["engines"][0]["stack"] == before
