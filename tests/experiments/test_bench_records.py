"""A run that a client measured, beside runs of the panels: everything reads it, or says in words what it has not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from experiments.bench.measuring import Measured
from experiments.bench.recording import rows
from experiments.bench.spec import check_bench
from experiments.cli.app import console
from experiments.cli.summary import summary_table
from experiments.compare import compare
from experiments.metrics import latencies_ms, summarize
from experiments.plots import save_figures
from experiments.records import Run, RunError, RunWriter, read_run, run_info
from experiments.render import comparison_table, difference_heading, headings
from experiments.replaying import replay_run
from experiments.timeline import timeline
from experiments.token_times import token_times
from experiments.workloads import Workload
from policies.records import REQUESTS
from runtime.client import Usage
from tests.dashboard.reading import bodies
from tests.experiments.fake_run import fake_info, fake_run, random_requests

REPO = Path(__file__).resolve().parents[2]
WAY_NS = 2_000_000
"""What the way to the server adds to every token."""

SPEC = check_bench(base_url="http://h", model="m", workload={"name": "fixed", "n": 1})


def client_info() -> dict[str, Any]:
    spec = SPEC.model_dump(mode="json")
    return run_info("client", spec=spec, limits={}, stack={}, clairvoyant=False, workload={"source": "test"})


def seen_of(real: Run) -> tuple[Workload, list[Measured]]:
    """What a client would have seen of a run of the runtime's."""
    times = token_times(real)
    requests = real.requests.reset_index(drop=True)
    by_id = requests.sort_values("request_id")
    workload = Workload(
        arrival_ns=by_id["arrival_ns"],
        prompt_tokens=by_id["prompt_tokens"],
        output_tokens=by_id["output_tokens"].clip(lower=1),
        max_tokens=by_id["max_tokens"],
    )
    ended = []
    for at, request in requests.iterrows():
        chunks = (times.of(int(str(at))) + WAY_NS).tolist()
        ended.append(
            Measured(
                int(request["request_id"]),
                int(request["arrival_ns"]),
                int(request["arrival_ns"]),
                chunks,
                chunks[-1] if chunks else int(request["arrival_ns"]),
                str(request["status"]),
                usage=Usage(int(request["prompt_tokens"]), int(request["output_tokens"])),
            )
        )
    return workload, ended


def write_client(folder: Path, workload: Workload, ended: list[Measured]) -> Run:
    with RunWriter(folder, client_info(), flush_seconds=None) as writer:
        for measured in ended:
            writer.request_seen(*rows(measured, workload, SPEC))
    return read_run(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A real run, its simulation, and what a client saw of the real one."""
    folder = tmp_path_factory.mktemp("runs")
    requests = random_requests(60, seed=1)
    real = fake_run(folder / "gpu", requests, kind="real")
    simulated = fake_run(folder / "model", requests)
    return {"real": real, "sim": simulated, "client": write_client(folder / "outside", *seen_of(real))}


def test_a_clients_rows_have_the_columns_of_the_panels(runs: dict[str, Run]) -> None:
    client = runs["client"]
    assert sorted(path.name for path in client.folder.iterdir()) == ["client.parquet", "requests.parquet", "run.json"]
    assert client.table("requests").column_names == list(REQUESTS)
    assert set(client.requests["before_step"]) == {-1}
    assert client.requests["first_scheduled_ns"].isna().all()


def test_its_latencies_are_the_real_ones_and_the_way(runs: dict[str, Run]) -> None:
    real, client = (latencies_ms(runs[kind]) for kind in ("real", "client"))
    assert client["ttft"] == pytest.approx(real["ttft"] + WAY_NS / 1e6)
    assert client["itl"] == pytest.approx(real["itl"])
    assert client["tpot"] == pytest.approx(real["tpot"])
    a, b = summarize(runs["real"]), summarize(runs["client"])
    for key in ("completed", "total_input_tokens", "total_output_tokens", "statuses", "max_concurrent_requests"):
        assert a[key] == b[key]
    for key in ("preemptions", "cached_token_share", "steps", "max_kv_blocks", "mean_queue_ms"):
        assert b[key] is None


@pytest.mark.parametrize(
    ("a", "b", "shown", "difference"),
    [
        ("real", "client", ("real", "client"), "difference"),
        ("client", "real", ("client", "real"), "difference"),
        ("client", "sim", ("client", "simulated"), "error"),
        ("client", "client", None, "difference"),
    ],
)
def test_it_is_compared_and_drawn_like_any_other(
    runs: dict[str, Run], tmp_path: Path, a: str, b: str, shown: tuple[str, str] | None, difference: str
) -> None:
    comparison = compare(runs[a], runs[b])
    assert comparison.matched == 60
    assert shown is None or headings(comparison) == shown
    assert difference_heading(comparison) == difference
    with console.capture() as captured:
        console.print(comparison_table(comparison))
    printed = " ".join(captured.get().split())
    assert "measured by a client, with the way to the server and back" in printed
    assert "without steps, decisions, queues and memory: outside" in printed
    assert "None" not in printed
    assert json.loads(comparison.to_json())["steps"]["error"] is None
    assert all(path.stat().st_size > 1000 for path in save_figures(comparison, tmp_path))


def test_its_summary_says_nothing_of_preemptions(runs: dict[str, Run]) -> None:
    with console.capture() as captured:
        console.print(summary_table(runs["client"], "m"))
    assert "preemptions" not in captured.get()
    assert "outside (client)" in captured.get()


def test_the_dashboard_shows_it_and_says_what_a_client_does_not_see(
    runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py"])
    monkeypatch.setenv("DIPTYCH_RUNS", str(runs["client"].folder.parent))
    app = AppTest.from_file(str(REPO / "dashboard" / "app.py"), default_timeout=60).run()
    app.selectbox[1].set_value("outside").run()
    assert not app.exception
    assert not app.error
    assert any("without steps, decisions, queues and memory" in body for body in bodies(app))


def test_what_needs_steps_says_that_there_are_none(runs: dict[str, Run], tmp_path: Path) -> None:
    why = "without steps: a client measured it from outside"
    with pytest.raises(RunError, match=why):
        _ = runs["client"].steps
    with pytest.raises(RunError, match=why):
        timeline(runs["client"])
    with pytest.raises(RunError, match="without decisions"):
        replay_run(runs["client"], tmp_path / "replay")
    with pytest.raises(RunError, match="without client"):
        _ = runs["real"].client


def test_a_run_of_another_kind_takes_the_folder_over_whole(runs: dict[str, Run], tmp_path: Path) -> None:
    write_client(tmp_path / "run", *seen_of(runs["real"]))
    with RunWriter(tmp_path / "run", fake_info(), overwrite=True):
        pass
    assert not (tmp_path / "run" / "client.parquet").exists()
    with RunWriter(tmp_path / "run", client_info(), overwrite=True):
        pass
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "client.parquet",
        "requests.parquet",
        "run.json",
    ]


def test_a_request_without_its_chunks_is_named(runs: dict[str, Run], tmp_path: Path) -> None:
    workload, ended = seen_of(runs["real"])
    with RunWriter(tmp_path / "run", client_info(), flush_seconds=None) as writer:
        for measured in ended[:3]:
            request, client = rows(measured, workload, SPEC)
            writer.request_seen(request, (client[0] if measured is not ended[1] else 999, *client[1:]))
    with pytest.raises(RunError, match=f"request {ended[1].request_id} has no row in client.parquet"):
        summarize(read_run(tmp_path / "run"))


KILLED = """
import os, signal, sys
from pathlib import Path
from experiments.records import RunWriter, read_run
from tests.experiments.test_bench_records import SPEC, client_info, rows, seen_of
workload, ended = seen_of(read_run(sys.argv[1]))
writer = RunWriter(Path(sys.argv[2]), client_info(), flush_seconds=None)
for number, measured in enumerate(ended):
    writer.request_seen(*rows(measured, workload, SPEC))
    if number == 30:
        writer.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_client_keeps_what_was_on_disk(runs: dict[str, Run], tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(runs["real"].folder), str(tmp_path / "run")]
    assert subprocess.run(command, cwd=REPO, timeout=60).returncode == -signal.SIGKILL
    run = read_run(tmp_path / "run")
    assert not run.complete
    assert summarize(run)["num_prompts"] == 31
    assert run.requests.equals(runs["client"].requests.head(31))
    assert "incomplete" in run.label
