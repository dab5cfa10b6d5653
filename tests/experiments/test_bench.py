"""`diptych bench` against a real server on a socket: what it sends, what it measures, what it leaves."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.bench.load import Counts, Load
from experiments.bench.measuring import Measured
from experiments.bench.result import result_json
from experiments.metrics import latencies_ms, per_request, summarize
from experiments.records import Run, read_run
from experiments.token_times import token_times
from experiments.workloads import WorkloadSpec, make_workload, prompt_token_ids
from runtime.client import AsyncClient
from tests.experiments.benching import (
    CHAT,
    COMPLETIONS,
    RANDOM_IDS,
    SMALL,
    bench,
    encode,
    model_server,
    no_model,
    steady,
)
from tests.openai_server import (
    DONE,
    Answer,
    Seen,
    chat_chunk,
    serving,
    text_chunk,
    usage_chunk,
)

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

RESULT_KEYS = """
date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness max_concurrency
duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput
output_throughput total_token_throughput max_output_tokens_per_s max_concurrent_requests rtfx
input_lens output_lens ttfts itls latencies start_times errors
"""


def test_an_open_loop_run_sends_each_request_at_its_time_and_records_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(model_server(steady)) as server:
        status, out, err = bench(
            monkeypatch, capsys, server.url, *SMALL, "-n", "20", "--rate", "40", "--api-key", "k3y"
        )
    assert (status, err) == (0, "")
    run = read_run("run")
    assert (run.complete, run.kind, run.label) == (True, "client", "run (client)")
    assert summarize(run)["statuses"]["length"] == 20

    workload = make_workload(WorkloadSpec(name="fixed", n=20, rate=40, prompt_tokens=6, output_tokens=4))
    client = run.client.sort_values("request_id")
    assert client["due_ns"].tolist() == workload.arrival_ns.tolist()
    late = run.requests.sort_values("request_id")["arrival_ns"].to_numpy() - client["due_ns"].to_numpy()
    assert -1_000_000 <= late.min() <= np.median(late) < 20_000_000  # uvloop's timers go by whole milliseconds
    said = re.search(r"lateness of a submission ([\d.]+) ms", out)
    assert said is not None
    assert float(said[1]) == pytest.approx(late.max() / 1e6, abs=0.06)

    bodies = server.bodies(COMPLETIONS)[1:]  # the first one warms up
    fixed = {"model": "the-model", "max_tokens": 4, "ignore_eos": True, "stream": True}
    fixed["stream_options"] = {"include_usage": True}
    assert [{**body, "prompt": None} for body in bodies] == [{**fixed, "prompt": None}] * 20
    assert sorted(body["prompt"] for body in bodies) == sorted(prompt_token_ids(workload, encode, 500, seed=0))
    assert {seen.headers.get("authorization") for seen in server.seen} == {"Bearer k3y"}
    ids = [seen.headers["x-request-id"] for seen in server.seen if seen.path == COMPLETIONS]
    assert len(set(ids)) == 21
    assert "k3y" not in Path("run", "run.json").read_text()
    assert run.spec["workload"]["rate"] == 40
    assert run.info["hardware"]["cores"] >= 1


def test_times_are_those_of_vllm_bench_serve(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chunks of several tokens: TPOT goes by tokens, ITL by chunks; what carries no choice moves nothing."""

    async def bursts(seen: Seen, answer: Answer) -> None:
        await answer.start()
        await asyncio.sleep(0.06)
        await answer.write(text_chunk(""))  # a token without text counts
        await answer.write(text_chunk("a b c"), text_chunk("d e f g", "length"), gap_s=0.04)
        await asyncio.sleep(0.1)
        await answer.write(usage_chunk(30, 8, prompt_tokens_details={"cached_tokens": 16}), DONE)
        await answer.end()

    with serving(model_server(bursts)) as server:
        status, _, _ = bench(monkeypatch, capsys, server.url, *SMALL, "-n", "10", "--rate", "20", *RANDOM_IDS)
    run = read_run("run")
    frame, samples = per_request(run), latencies_ms(run)
    assert status == 0
    assert frame["output_tokens"].tolist() == [8] * 10
    assert frame["prompt_tokens"].tolist() == [30] * 10
    assert token_times(run).counts.tolist() == [3] * 10
    assert len(samples["itl"]) == 20
    assert 60 <= np.median(samples["ttft"]) < 90
    assert 40 <= np.median(samples["itl"]) < 60
    assert 140 <= np.median(samples["e2el"]) < 200  # to the last token, not to the usage 100 ms later
    assert frame["tpot_ms"].to_numpy() == pytest.approx((frame["e2e_ms"] - frame["ttft_ms"]).to_numpy() / 7)
    assert summarize(run)["cached_token_share"] == pytest.approx(16 / 30)


def test_the_result_file_has_vllms_keys_and_figures_that_follow_from_its_lists(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--save-result", "out/result.json", "--save-detailed", "--goodput", "ttft:15", "--goodput", "e2el:2000"]
    with serving(model_server(steady)) as server:
        bench(monkeypatch, capsys, server.url, *SMALL, "-n", "25", "--rate", "50", *RANDOM_IDS, *flags)
    result = json.loads(Path("out", "result.json").read_text())
    expected = set(re.findall(r"\w+", RESULT_KEYS))
    kinds = ("mean", "median", "std", "p50", "p90", "p95", "p99")
    expected |= {f"{kind}_{name}_ms" for kind in kinds for name in ("ttft", "tpot", "itl", "e2el")}
    assert set(result) == expected

    ttfts, latencies, lens = (np.array(result[name]) for name in ("ttfts", "latencies", "output_lens"))
    itls = np.concatenate([np.array(of) for of in result["itls"]])
    tpots = (latencies - ttfts) / (lens - 1)
    for name, values in (("ttft", ttfts), ("tpot", tpots), ("itl", itls), ("e2el", latencies)):
        assert result[f"mean_{name}_ms"] == pytest.approx(1000 * values.mean())
        assert result[f"std_{name}_ms"] == pytest.approx(1000 * values.std())
        assert result[f"p99_{name}_ms"] == pytest.approx(1000 * np.percentile(values, 99))
    assert len(itls) == 25 * 3
    assert (result["completed"], result["failed"], result["num_prompts"]) == (25, 0, 25)
    assert (result["model_id"], result["request_rate"], result["max_concurrency"]) == ("the-model", 50, None)
    assert result["output_throughput"] == pytest.approx(100 / result["duration"])
    good = int(np.sum((ttfts <= 0.015) & (latencies <= 2)))
    assert result["request_goodput"] == pytest.approx(good / result["duration"])


def test_a_closed_loop_keeps_so_many_in_flight_and_ignores_arrival_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(model_server(steady)) as server:
        status, out, _ = bench(monkeypatch, capsys, server.url, *SMALL, "-n", "30", "--concurrency", "5", *RANDOM_IDS)
    run = read_run("run")
    assert status == 0
    assert server.most_open == 5
    assert len(run.requests) == 30
    assert result_json(run)["max_concurrency"] == 5
    assert result_json(run)["request_rate"] == "inf"
    assert summarize(run)["duration"] == pytest.approx(6 * 0.04, rel=0.9)
    assert "lateness of a submission 0.0 ms" in out


def test_chat_sends_messages_and_its_first_token_is_the_first_with_content(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def talk(seen: Seen, answer: Answer) -> None:
        await answer.start()
        await answer.write(chat_chunk({"role": "assistant", "content": ""}))
        await answer.write(chat_chunk({"content": "Hi"}), chat_chunk({"content": "!"}), gap_s=0.05)
        await answer.write(chat_chunk({}, "stop"), usage_chunk(9, 2), DONE)
        await answer.end()

    with serving(model_server(talk)) as server:
        flags = ["--api", "chat", "--no-ignore-eos", "--temperature", "0", "--extra-body", '{"top_k": 1}']
        status, out, _ = bench(monkeypatch, capsys, server.url, *SMALL, "-n", "4", "--rate", "20", *flags)
    run = read_run("run")
    assert status == 0
    assert "text by the server's tokenizer" in out
    assert run.requests["status"].tolist() == ["stop"] * 4
    assert 50 <= np.median(latencies_ms(run)["ttft"]) < 90
    assert token_times(run).counts.tolist() == [2] * 4
    for body in server.bodies(CHAT):
        assert set(body) == {
            "model",
            "messages",
            "max_completion_tokens",
            "stream",
            "stream_options",
            "temperature",
            "top_k",
        }
        assert [message["role"] for message in body["messages"]] == ["user"]
        assert len(body["messages"][0]["content"]) == 6


def test_answers_without_usage_are_counted_by_their_chunks_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def silent(seen: Seen, answer: Answer) -> None:
        await answer.start()
        await answer.write(text_chunk("a"), text_chunk("b"), text_chunk("c", "stop"), DONE)
        await answer.end()

    with serving(model_server(silent)) as server:
        status, out, _ = bench(monkeypatch, capsys, server.url, *SMALL, "-n", "3", "--rate", "90", *RANDOM_IDS)
    assert status == 0
    assert read_run("run").requests["output_tokens"].tolist() == [3, 3, 3]
    assert "3 answers came without usage" in out


def test_a_trace_is_sent_by_its_own_times_and_faster_where_that_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"arrival_ns": i * 200_000_000, "prompt_tokens": 5 + i, "output_tokens": 2, "tenant": "t"} for i in range(5)
    ]
    Path("trace.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    with serving(model_server(steady)) as server:
        status, _, _ = bench(monkeypatch, capsys, server.url, "-w", "trace.jsonl", "--speed-up", "4", *RANDOM_IDS)
    run = read_run("run")
    assert status == 0
    assert run.client.sort_values("request_id")["due_ns"].tolist() == [i * 50_000_000 for i in range(5)]
    assert sorted(len(body["prompt"]) for body in server.bodies(COMPLETIONS)[1:]) == [5, 6, 7, 8, 9]
    assert {body["user"] for body in server.bodies(COMPLETIONS)} == {"t"}
    assert {seen.headers["x-tenant"] for seen in server.seen if seen.path == COMPLETIONS} == {"t"}
    assert set(run.requests["tenant"]) == {"t"}


def test_warm_up_requests_do_not_count_and_begin_like_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(model_server(steady)) as server:
        flags = ["-n", "6", "--rate", "100", "--warm-up", "3", *RANDOM_IDS]
        assert bench(monkeypatch, capsys, server.url, *SMALL, *flags)[0] == 0
    bodies = server.bodies(COMPLETIONS)
    assert (len(bodies), len(read_run("run").requests)) == (9, 6)
    assert {tuple(body["prompt"][:3]) for body in bodies[:3]}.isdisjoint(tuple(b["prompt"][:3]) for b in bodies[3:])
    assert {len(body["prompt"]) for body in bodies} == {6}


def test_a_server_that_tells_no_tokenizer_gets_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def handler(seen: Seen, answer: Answer) -> None:
        await (steady if seen.path == COMPLETIONS else no_model)(seen, answer)

    with serving(handler) as server:
        flags = ["-m", "x", "--prompts", "text", "-n", "3", "--rate", "50"]
        status, out, _ = bench(monkeypatch, capsys, server.url, *SMALL, *flags)
    assert status == 0
    assert "as many words as the workload has tokens" in out
    assert {len(body["prompt"].split()) for body in server.bodies(COMPLETIONS)[1:]} == {6}


def test_a_generator_that_falls_behind_says_by_how_much(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_loop = Load.open_loop

    async def starved(self: Load, due_ns: list[int]) -> None:
        asyncio.get_running_loop().call_later(0.05, time.sleep, 0.3)  # something else takes the core
        await open_loop(self, due_ns)

    monkeypatch.setattr(Load, "open_loop", starved)
    with serving(model_server(steady)) as server:
        status, out, _ = bench(monkeypatch, capsys, server.url, *SMALL, "-n", "40", "--rate", "100", *RANDOM_IDS)
    assert status == 0
    said = re.search(r"submission ([\d.]+) ms, of the event loop ([\d.]+) ms: this generator fell behind", out)
    assert said is not None
    assert float(said[1]) > 200
    assert float(said[2]) > 150
    assert (run_lateness(read_run("run")) / 1e6) == pytest.approx(float(said[1]), abs=0.06)


def run_lateness(run: Run) -> int:
    """Largest lateness of a submission, from the record, ns."""
    both = run.requests.merge(run.client, on="request_id")
    return int((both["arrival_ns"] - both["due_ns"]).max())


def test_counts_add_up_while_it_runs() -> None:
    seen: list[tuple[int, int, int, int]] = []
    ended: list[Measured] = []

    def on_tick(counts: Counts) -> None:
        seen.append((counts.sent, counts.running, counts.completed, counts.failed))

    async def main(url: str) -> None:
        body = json.dumps({"prompt": [7], "max_tokens": 5}).encode()
        async with AsyncClient(url, retries=0) as client:
            load = Load(client, COMPLETIONS, lambda i: body, ended.append, 10)
            watch = asyncio.create_task(load.watch(on_tick, every_s=0.01))
            await load.open_loop([i * 5_000_000 for i in range(40)])
            watch.cancel()
            on_tick(load.counts)

    with serving(steady) as server:
        asyncio.run(main(server.url))
    assert len(seen) > 10
    assert all(sent == running + completed + failed for sent, running, completed, failed in seen)
    assert max(running for _, running, _, _ in seen) > 3
    assert seen[-1] == (40, 0, 40, 0)
    assert sorted(measured.request_id for measured in ended) == list(range(40))
