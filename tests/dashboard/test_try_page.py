"""The page "Try", run without a browser, and the process behind it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from dashboard.job import Job
from experiments.compare import compare
from experiments.metrics import summarize
from experiments.records import read_run
from experiments.simulated import run_simulated
from experiments.spec import check_spec
from tests.dashboard.reading import opened


def script(root: str) -> None:
    from pathlib import Path

    from dashboard import try_page

    try_page.show(Path(root))


def page(root: Path, **in_url: str) -> AppTest:
    return opened(AppTest.from_function(script, default_timeout=60, args=(str(root),)), **in_url)


def ended(job: Job) -> Job:
    deadline = time.monotonic() + 120
    while job.running:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return job


def button(app: AppTest, label: str) -> object:
    return next(button for button in app.button if button.label == label)


SPEC = check_spec({"target": "sim", "workload": {"name": "chat", "n": 30, "rate": 5.0}})


def test_what_is_simulated_is_what_the_command_line_simulates(tmp_path: Path) -> None:
    job = ended(Job(SPEC))
    assert job.error == ""
    assert job.progress == (30, 30)
    run_simulated(SPEC, tmp_path / "direct")
    job.save(tmp_path, "saved")
    found = compare(read_run(tmp_path / "direct"), read_run(tmp_path / "saved"))
    assert found.divergence is None
    assert all(pair.error == 0 for _, _, pair in found.figures())
    with pytest.raises(ValueError, match="there already"):
        job.save(tmp_path, "saved")
    for name in ("../out", "", "/tmp/out", ".hidden"):
        with pytest.raises(ValueError, match="a name has"):
            job.save(tmp_path, name)
    folder = job.folder
    job.discard()
    assert not folder.exists()


def test_a_cancelled_simulation_leaves_what_it_had(tmp_path: Path) -> None:
    job = Job(check_spec({"target": "sim", "workload": {"name": "chat", "n": 50_000, "rate": 20.0}}))
    deadline = time.monotonic() + 60
    while not len(list(job.folder.glob("parts/requests-*.parquet"))) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job.cancel()
    assert (job.running, job.cancelled, job.error) == (False, True, "")
    run = read_run(job.folder)
    assert not run.complete
    assert 0 < summarize(run)["completed"] < job.progress[0] + 250  # which joins requests and steps: they go together


def test_a_failure_is_said_in_one_line() -> None:
    spec = check_spec({"target": "sim", "workload": {"name": "/nowhere/trace.jsonl"}})
    assert "/nowhere/trace.jsonl" in ended(Job(spec)).error


def test_the_form_says_what_is_wrong_and_starts_nothing(tmp_path: Path) -> None:
    app = page(tmp_path, scheduler="sarathi,chunk_size=none")
    assert "chunk\\_size" in app.error[0].value
    assert button(app, "Simulate").disabled  # type: ignore[attr-defined]
    assert "policies of your own" in page(tmp_path, queue="os:system").error[0].value
    small = page(tmp_path, model="llama-3.1-70b", device="l4")
    assert "leaves no memory" in small.error[0].value


def test_the_form_is_in_the_url_and_as_a_command(tmp_path: Path) -> None:
    app = page(tmp_path, n="40", rate="2.5", device="l4", model="qwen2.5-0.5b", scheduler="sarathi,chunk_size=64")
    command = app.code[0].value.replace("\\\n", " ").split()
    for pair in ("-n 40", "--model qwen2.5-0.5b", "--rate 2.5", "--device l4", "--scheduler sarathi,chunk_size=64"):
        assert pair.split() == command[command.index(pair.split()[0]) :][:2]
    assert app.query_params["queue"] == "fcfs"
    assert page(tmp_path, n="lots").number_input(key="n").value == 500


def test_a_simulation_is_run_and_kept_from_the_page(tmp_path: Path) -> None:
    app = page(tmp_path, n="30", rate="5")
    button(app, "Simulate").click().run()  # type: ignore[attr-defined]
    ended(app.session_state["job"])
    app.run()
    assert not app.exception
    assert len(app.get("plotly_chart")) == 2
    (tmp_path / "taken").mkdir()
    app.text_input(key="save-as").set_value("taken").run()
    button(app, "Save").click().run()  # type: ignore[attr-defined]
    assert "there already" in app.error[0].value
    app.text_input(key="save-as").set_value("kept").run()
    button(app, "Save").click().run()  # type: ignore[attr-defined]
    assert "Saved as kept" in app.success[0].value
    assert len(read_run(tmp_path / "kept").requests) == 30
