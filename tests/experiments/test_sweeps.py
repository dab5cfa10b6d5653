"""A sweep in its folder: kept, gone on with, measured, and the same however it was run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from experiments.cli.app import console
from experiments.intervals import interval, paired
from experiments.metrics import summarize
from experiments.records import read_run
from experiments.simulated import run_simulated
from experiments.spec import RunSpec, SpecError
from experiments.sweeps import Measure, Window, identity, read_sweep, run_cells, run_sweep, state_of
from experiments.sweeps.cell_run import Job, perform_in
from experiments.sweeps.identity import code_key
from experiments.sweeps.measuring import measured
from experiments.sweeps.plug_ins import files_of
from experiments.sweeps.table import differences
from policies.queues.fcfs import Fcfs
from tests.experiments.command import diptych
from tests.experiments.test_fidelity_simulated import LIMITS, MEASURED

BASE: dict[str, Any] = {
    "workload": {"name": "fixed", "n": 12, "rate": 40, "prompt_tokens": 20, "output_tokens": 5},
    "decisions": False,
    "cost": {"kind": "constant", "step_ms": 10},
    "limits": {"num_blocks": 500, "max_num_seqs": 2},
}
PLUG_IN = """
from policies.queues.fcfs import Fcfs
import os, signal

class Mine(Fcfs):
    def __init__(self, break_off: int = 0) -> None:
        if break_off == 1:
            raise RuntimeError("not today")
        if break_off == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        super().__init__()
"""


class Here:
    """Runs cells in this process; how many, and which."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.ran: list[str] = []
        self.stop_after = stop_after

    def __call__(self, jobs: Sequence[Job], cells: Path) -> Iterator[tuple[Job, dict[str, Any]]]:
        for job in jobs:
            if len(self.ran) == self.stop_after:
                raise KeyboardInterrupt
            self.ran.append(job.name)
            yield job, perform_in(job, cells)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("results.parquet", "results.csv", "summary.md")}


def test_what_is_finished_is_kept_and_the_table_is_the_same_as_without_a_stop(tmp_path: Path) -> None:
    sweep = read_sweep({"base": BASE, "variables": {"grid": {"policies.queue": ["fcfs", "sjf"]}, "seeds": 1}})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    table = run_sweep(sweep, whole, runner=Here())
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, parts, runner=Here(stop_after=1))
    assert not (parts / "results.parquet").exists()
    rest = Here()
    run_sweep(sweep, parts, runner=rest)
    assert rest.ran == [cell.name for cell in sweep.cells[1:]]
    assert contents(parts) == contents(whole)
    again = Here()
    assert run_sweep(sweep, parts, runner=again).equals(table)
    assert again.ran == []
    note = json.loads((parts / "cells" / sweep.cells[0].name / "cell.json").read_text())
    assert note["spec"] == sweep.cells[0].spec.model_dump(mode="json")
    assert note["key"] == sweep.cells[0].key
    assert {"diptych", "git", "software"} <= set(note["versions"])


def test_a_cell_has_the_limits_of_its_calibration_and_its_pools_what_the_run_gives_them(tmp_path: Path) -> None:
    MEASURED.calibration.save(tmp_path / "calibration.json")
    workload = {"name": "fixed", "n": 2, "rate": 1.0}
    fitted = {"workload": workload, "cost": {"kind": "fitted", "calibration": str(tmp_path / "calibration.json")}}
    scaled = {
        "workload": workload,
        "cold_start_s": 3,
        "price_per_hour": 2.0,
        "pools": [{"name": "a"}],
        "policies": {"autoscaler": "target_load"},
    }
    found = []
    for name, base in (("fitted", fitted), ("scaled", scaled)):
        sweep = read_sweep({"base": {"target": "sim", **base}})
        run_sweep(sweep, tmp_path / name, runner=Here())
        run_simulated(sweep.cells[0].spec, tmp_path / f"{name} alone")
        cell, alone = read_run(tmp_path / name / "cells" / sweep.cells[0].name), read_run(tmp_path / f"{name} alone")
        assert cell.limits == alone.limits
        assert cell.info.get("pools") == alone.info.get("pools")
        found.append(cell)
    assert found[0].limits["max_num_seqs"] == LIMITS.max_num_seqs
    assert [(pool["cold_start_ns"], pool["price_per_hour"]) for pool in found[1].info["pools"]] == [(3 * 10**9, 2.0)]


def test_the_code_of_a_cell_is_that_of_its_pools_policies_too_and_not_that_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_in_a_pool.py").write_text(PLUG_IN)
    monkeypatch.syspath_prepend(tmp_path)
    pool = {"name": "a", "policies": {"queue": "mine_in_a_pool:Mine"}}
    (cell,) = read_sweep({"base": {"workload": {"name": "fixed", "n": 2}, "pools": [pool]}}).cells
    before = code_key("sim", cell.spec)
    (tmp_path / "mine_in_a_pool.py").write_text(PLUG_IN + "# otherwise\n")
    assert code_key("sim", cell.spec) != before
    seen: list[Path] = []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: seen.append(path) or read(path))
    identity._project.__wrapped__("sim")
    folders = {path.relative_to(identity.ROOT).parts[:2] for path in seen}
    assert ("experiments", "records") in folders
    assert not folders & {("experiments", "cli"), ("experiments", "published")}


def test_a_plug_in_is_of_its_whole_package_and_of_the_files_that_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queues_of_ours").mkdir()
    files = {
        "queues_of_ours/__init__.py": "",
        "queues_of_ours/mine.py": PLUG_IN,
        "queues_of_ours/other.py": "def late():\n    import numpy, helped_by\n",
        "helped_by.py": "from math import inf\n",
        "no_part_of_it.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    wanted = {"helped_by.py", "__init__.py", "mine.py", "other.py"}
    assert {path.name for path in files_of("queues_of_ours.mine")} == wanted
    for policies in ({"queue": "queues_of_ours.mine:Mine"}, {"scheduler": "mixed"}):
        (cell,) = read_sweep({"base": {"workload": {"name": "fixed", "n": 2}, "policies": policies}}).cells
        before = code_key("sim", cell.spec)
        for name in files:
            (tmp_path / name).write_text((tmp_path / name).read_text() + "# otherwise\n")
            changed = code_key("sim", cell.spec) != before
            assert changed == ("queue" in policies and Path(name).name in wanted), name
            (tmp_path / name).write_text(files[name])
            before = code_key("sim", cell.spec)


def test_a_default_that_is_given_makes_no_other_cell_unless_it_stands_in_for_what_was_measured(tmp_path: Path) -> None:
    def key(**fields: Any) -> str:
        (cell,) = read_sweep({"base": {"workload": {"name": "fixed", "n": 2}, **fields}}).cells
        return cell.key

    plain = key()
    given = RunSpec.model_validate({"target": "sim", "workload": {"name": "fixed", "n": 2}}).model_dump(mode="json")
    assert key(**given) == plain
    assert key(limits={"lag": 0}) != plain
    pool = {"name": "a", "replicas": 2}
    assert key(pools=[{**pool, "role": "both", "limits": {"block_size": 16}}]) == key(pools=[pool])
    assert key(pools=[{**pool, "limits": {"block_size": 16}}], limits={"block_size": 32}) != key(
        pools=[pool], limits={"block_size": 32}
    )
    MEASURED.calibration.save(tmp_path / "calibration.json")
    fitted = {"kind": "fitted", "calibration": str(tmp_path / "calibration.json")}
    assert key(cost=fitted, limits={"max_num_seqs": 256}) != key(cost=fitted)


def test_a_field_that_a_specification_has_got_since_leaves_cells_as_they_were() -> None:
    (cell,) = read_sweep({"base": BASE}).cells

    class Later(RunSpec):
        new: int = 3

    later = Later.model_validate(cell.spec.model_dump(exclude_unset=True))
    assert identity.cell_key(later, "sim", None) == cell.key
    assert identity.cell_key(later.model_copy(update={"new": 4}), "sim", None) != cell.key


def test_more_cells_run_only_what_is_new_and_other_code_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = read_sweep({"base": BASE, "variables": {"seeds": 1}})
    more = read_sweep({"base": BASE, "variables": {"seeds": 2}})
    run_sweep(few, tmp_path, runner=Here())
    new = Here()
    run_sweep(more, tmp_path, runner=new)
    assert new.ran == [more.cells[1].name]
    path = tmp_path / "cells" / more.cells[1].name / "cell.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "code": "older"}))
    state = state_of(more.cells, tmp_path)
    assert (list(state.finished), state.outdated) == ([more.cells[0].name], [more.cells[1].name])
    assert len(state_of(more.cells, tmp_path, keep_outdated=True).finished) == 2


def test_another_window_measures_anew_and_runs_nothing(tmp_path: Path) -> None:
    run_sweep(read_sweep({"base": BASE}), tmp_path, runner=Here())
    none = Here()
    table = run_sweep(read_sweep({"base": BASE, "window": {"skip_first": 0.5}}), tmp_path, runner=none)
    assert none.ran == []
    assert table["num_prompts"].tolist() == [6]


def test_cells_fail_alone_and_ctrl_c_ends_the_workers_and_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With processes: one cell raises, the process of another is killed, and during the next one the user has enough.

    What it was at leaves nothing, and its process is gone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("plug_in.py").write_text(PLUG_IN)
    queues = ["fcfs", "plug_in:Mine,break_off=1", "plug_in:Mine,break_off=2", "plug_in:Mine"]
    lengths = [12, 12, 12, 200_000]
    zipped = {"policies.queue": queues, "workload.n": lengths}
    Path("sweep.yaml").write_text(json.dumps({"base": BASE, "variables": {"zip": zipped}}))
    places, began = Path("sweeps/sweep/cells"), threading.Event()
    before = psutil.Process().children(recursive=True)  # of other tests in this process

    def interrupt() -> None:
        while not any(path.name.startswith(".plug_in_Mine-n=200000") for path in places.glob(".*")):
            time.sleep(0.05)
        began.set()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    status, _, err = diptych(monkeypatch, capsys, "sweep", "sweep.yaml", "--processes", "1")
    assert (status, began.is_set()) == (130, True)
    lines = [line for line in err.splitlines() if line]
    assert "failed: RuntimeError: not today" in lines[0]
    assert "failed: its process died (signal SIGKILL)" in lines[1]
    assert "interrupted; 1 of 4 cells are in sweeps/sweep, and the same command goes on" in lines[2]
    left = [process for process in psutil.Process().children(recursive=True) if process not in before]
    assert not left[1:]  # at most the one that keeps track of semaphores

    status, out, _ = diptych(monkeypatch, capsys, "sweep", "sweep.yaml", "--dry-run")
    assert [line.split()[0] for line in out.splitlines()] == ["finished", "to", "to", "to", "4"]
    few = {field: [*values[:2], values[3]] for field, values in {**zipped, "workload.n": [12] * 4}.items()}
    here = Here()
    table = run_sweep(read_sweep({"base": BASE, "variables": {"zip": few}}), "sweeps/sweep", runner=here)
    assert len(here.ran) == 2
    assert table["status"].tolist() == ["ok", "failed", "ok"]
    assert table["error"].tolist() == ["", "RuntimeError: not today", ""]
    assert table["mean_ttft_ms"].notna().tolist() == [True, False, True]
    assert table["mean_ttft_ms"][0] == table["mean_ttft_ms"][2]
    assert "RuntimeError: not today" in Path("sweeps/sweep/summary.md").read_text()
    assert not list(places.glob(".*"))


def test_a_folder_with_other_things_and_one_that_is_in_use_are_left_alone(tmp_path: Path) -> None:
    sweep = read_sweep({"base": BASE})
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    with pytest.raises(SpecError, match="holds other things than a sweep"):
        run_sweep(sweep, other)

    def inside(jobs: Sequence[Job], cells: Path) -> Iterator[tuple[Job, dict[str, Any]]]:
        run_sweep(sweep, tmp_path / "sweep", runner=Here())
        yield from ()

    with pytest.raises(SpecError, match="another sweep is running"):
        run_sweep(sweep, tmp_path / "sweep", runner=inside)


def test_without_a_window_the_figures_are_those_of_the_summary(tmp_path: Path) -> None:
    (cell,) = read_sweep({"base": BASE}).cells
    run_simulated(cell.spec, tmp_path / "run")
    run = read_run(tmp_path / "run")
    figures, summary = measured(run, Measure(slo={"ttft": 20})), summarize(run, {"ttft": 20})
    same = {name: value for name, value in summary.items() if isinstance(value, int | float)}
    assert {name: figures[name] for name in same} == same
    assert figures["num_length"] == 12


def test_a_window_takes_latencies_by_arrival_and_rates_by_time(tmp_path: Path) -> None:
    """One slot, ten requests at once, each of two steps of 10 ms: they end at 20, 40, ... 200 ms."""
    base = {
        "workload": {"name": "fixed", "n": 10, "arrivals": "at-once", "prompt_tokens": 5, "output_tokens": 2},
        "cost": {"kind": "constant", "step_ms": 10},
        "limits": {"num_blocks": 100, "max_num_seqs": 1, "lag": 0},
    }
    (cell,) = read_sweep({"base": base}).cells
    run_simulated(cell.spec, tmp_path / "run")
    found = measured(read_run(tmp_path / "run"), Measure(window=Window(skip_first=0.2), slo={"ttft": 100}))
    assert found["num_prompts"] == found["completed"] == 8
    assert found["mean_ttft_ms"] == pytest.approx(np.mean([20 * i + 10 for i in range(2, 10)]))
    assert found["duration"] == pytest.approx(0.2)  # to the end of the run, as nothing is skipped there
    assert found["request_throughput"] == pytest.approx(10 / 0.2)
    assert found["output_throughput"] == pytest.approx(20 / 0.2)
    assert found["request_goodput"] == pytest.approx(3 / 0.2)  # TTFT 50, 70, 90 ms


def test_a_window_of_a_steady_stream_has_its_rate_without_ramp_and_drain(tmp_path: Path) -> None:
    """A request every 100 ms that takes 200: the rate is 10 a second, which the drain would lower."""
    times = "".join(f"{i / 10},5,20\n" for i in range(50))
    (tmp_path / "trace.csv").write_text("Timestamp,Request tokens,Response tokens\n" + times)
    base = {"workload": {"name": str(tmp_path / "trace.csv")}, "cost": BASE["cost"], "limits": {"num_blocks": 500}}
    (cell,) = read_sweep({"base": base}).cells
    run_simulated(cell.spec, tmp_path / "run")
    run = read_run(tmp_path / "run")
    steady = measured(run, Measure(window=Window(skip_first=0.2, skip_last=0.2)))
    assert steady["request_throughput"] == pytest.approx(10)
    assert steady["output_throughput"] == pytest.approx(200)
    assert measured(run, Measure())["request_throughput"] < 9.9


def test_intervals_are_students() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.half == pytest.approx(3.182446 * 1.2909944 / 2, rel=1e-6)  # t(0.975, 3) s / sqrt(n)
    assert interval([3.0]).half is None
    difference = paired([1.0, 5.0, 9.0], [2.0, 6.0, 10.5])
    assert difference.mean == pytest.approx(7 / 6)
    assert difference.half == pytest.approx(4.302653 * 0.2886751 / 3**0.5, rel=1e-6)
    assert difference.apart_from_zero
    with pytest.raises(ValueError, match="as many of each"):
        paired([1.0], [1.0, 2.0])


def test_policies_are_compared_on_the_same_arrivals(tmp_path: Path) -> None:
    """By seeds where there are some; where there is one, by a bootstrap over its requests."""
    grid = {"limits.max_num_seqs": [2, 4], "workload.rate": [80]}
    content = {"base": BASE, "variables": {"grid": grid, "seeds": 2}, "compare": "limits.max_num_seqs"}
    sweep = read_sweep(content)
    table = run_sweep(sweep, tmp_path / "seeds", runner=Here())
    found = differences(table, sweep, ("mean_ttft_ms",), tmp_path / "seeds" / "cells")
    rows = table.set_index(["limits.max_num_seqs", "seed"])["mean_ttft_ms"]
    by = paired([rows[2, k] for k in range(2)], [rows[4, k] for k in range(2)])
    assert [(one.first, one.value, one.among, one.by) for one in found] == [
        (2, 4, {"workload.rate": 80, "panel": "sim"}, by)
    ]
    once = read_sweep({**content, "variables": {"grid": grid}})
    table = run_sweep(once, tmp_path / "once", runner=Here())
    found = differences(table, once, ("mean_ttft_ms", "output_throughput"), tmp_path / "once" / "cells")
    assert [one.by.half is None for one in found] == [False, True]


def test_cells_can_be_run_without_a_sweep(tmp_path: Path) -> None:
    cells = read_sweep({"base": BASE, "variables": {"seeds": 2}}).cells
    said: list[str] = []
    notes = run_cells(cells, tmp_path, Measure(), runner=Here(), say=lambda cell, note: said.append(cell.name))
    assert list(notes) == said == [cell.name for cell in cells]
    shutil.rmtree(tmp_path / "cells" / said[1])
    assert list(state_of(cells, tmp_path).finished) == said[:1]


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_table_on_a_terminal_has_means_over_seeds_and_what_there_is_room_for(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "_width", columns)  # which COLUMNS, where it is set, had fixed at the import
    content = {
        "base": BASE,
        "variables": {"grid": {"policies.scheduler": ["mixed", "sarathi,chunk_size=64"]}, "seeds": 2},
    }
    Path("sweep.yaml").write_text(json.dumps(content), encoding="utf-8")
    status, out, _ = diptych(monkeypatch, capsys, "sweep", "sweep.yaml", "--processes", "1")
    assert status == 0
    table = [line for line in out.splitlines() if line[:1] in "┏┃┡│└"]
    assert max(map(len, table)) <= columns
    assert sum(line.startswith("│ sarathi,chunk_size=64 │") for line in table) == 1
    assert "…" not in "".join(table)
    assert "Means over 2 seeds" in out
    assert ("no room for" in " ".join(out.split())) == (columns < 200)


def test_the_table_tells_long_values_apart_and_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(console, "_width", 60)
    Path("breaking.py").write_text(PLUG_IN)
    schedulers = [f"mixed,long_prefill_threshold={tokens}" for tokens in (1_000_000_000, 1_000_000_001)]
    grid = {"policies.scheduler": schedulers, "policies.queue": ["fcfs", "breaking:Mine,break_off=1"]}
    Path("sweep.yaml").write_text(json.dumps({"base": BASE, "variables": {"grid": grid}}), encoding="utf-8")
    status, out, _ = diptych(monkeypatch, capsys, "sweep", "sweep.yaml", "--processes", "1")
    assert status == 1
    table = [line for line in out.splitlines() if line[:1] in "┏┃┡│└"]
    assert max(map(len, table)) <= 60
    cells = [[part.strip() for part in line.split("│")[1:-1]] for line in table if line[:1] == "│"]
    unfolded = "".join(cell[0] for cell in cells)
    assert all(scheduler in unfolded for scheduler in schedulers)
    assert sum(cell[2] == "failed" for cell in cells) == 2


def test_a_policy_in_the_script_that_sweeps_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = type("Mine", (Fcfs,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Mine", mine, raising=False)
    with pytest.raises(SpecError, match="put them into a module"):
        run_sweep(read_sweep({"base": {**BASE, "policies": {"queue": "__main__:Mine"}}}), tmp_path, runner=Here())
