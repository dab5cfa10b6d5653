"""The real panel's half: one model, one runner, one cell of the matrix after another, each kept as a small record.

    FOLDER/matrix.json              what was asked for
    FOLDER/calibrations/CARD.json   the cost model of each card that cells ran on, and the steps it was fitted to
    FOLDER/runs/CELL/               a run folder
    FOLDER/failed.json              why a cell has none

What is there is not run again, so a call that was stopped goes on where it was.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.fidelity.archive import SCRATCH
from experiments.fidelity.capacity import capacity, card, saturated
from experiments.fidelity.matrix import POLICIES, Cell, Sizes, Work, arrivals_at
from experiments.metrics import summarize
from experiments.profiling import profile
from experiments.real import Prepared, load, prepare, run_prepared, start_runner
from experiments.records import Run, compact_run, describe_environment, read_run
from experiments.spec import LimitsSpec, RunSpec, check_spec
from experiments.workloads import make_workload
from policies.replica_state import Limits
from simulator.costs.fitted import FittedCost

SPEED_UP = 10.0
"""How much faster than expected requests come that are to come at once and cannot."""


class Clock:
    """Says whether there is time left for so many seconds."""

    def __init__(self, limit_s: float | None) -> None:
        self._until = None if limit_s is None else time.monotonic() + limit_s

    def left(self) -> float:
        return float("inf") if self._until is None else self._until - time.monotonic()


class RealHalf:
    """Serves the cells. A context manager: it holds the device.

    Args:
        base: model, limits and seed; every cell has these, with its own workload and policies.
        folder: where records go.
        say: gets one line about each thing that was done.
        kept: called when there is more in the folder.
    """

    def __init__(
        self,
        base: RunSpec,
        works: Mapping[str, Work],
        folder: Path,
        sizes: Sizes,
        say: Callable[[str], None],
        kept: Callable[[], None] = lambda: None,
    ) -> None:
        self._base, self._works, self._folder, self._sizes = base, works, folder, sizes
        self._say, self._kept = say, kept
        self._costs: FittedCost | None = None

    def __enter__(self) -> RealHalf:
        started = time.monotonic()
        self._loaded = load(self._base.model)
        self._prepared = prepare(self._base, self._loaded)
        self._runner = start_runner(self._loaded, self._prepared.limits, self._prepared.spec.model)
        gc.collect()
        gc.freeze()  # what lives as long as the model is not looked at again
        parts = {**self._prepared.seconds, **self._runner.startup_seconds}
        described = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
        self._say(
            f"started in {time.monotonic() - started:.1f} s ({described}); {self._prepared.limits.num_blocks} blocks"
        )
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        self._runner.close()
        self._loaded.close()

    def calibrate(self) -> FittedCost:
        """The cost model of this card, measured now if it has not been."""
        path = self._folder / "calibrations" / f"{card(describe_environment('real')['hardware'])}.json"
        if path.exists():
            self._costs = FittedCost.load(path)
            return self._costs
        started = time.monotonic()
        steps = path.with_suffix(".parquet")
        fitted = profile(
            self._base,
            self._sizes.profile_seconds,
            loaded=self._loaded,
            prepared=self._prepared,
            runner=self._runner,
            steps_to=steps,
        )
        fitted.save(path)
        self._costs = fitted
        self._say(f"profiled {fitted.calibration.provenance['num_steps']} steps in {time.monotonic() - started:.1f} s")
        self._kept()
        return fitted

    def run(self, cells: Iterable[Cell], clock: Clock) -> int:
        """Run what is not there yet while there is time. Returns how many cells were run."""
        failed = self._failed()
        done = 0
        for cell in cells:
            path = self._folder / "runs" / cell.name
            if (path / "run.json").exists() or cell.name in failed:
                continue
            capacity = None if cell.load is None else self.capacity(cell.work)
            if cell.load is not None and capacity is None:
                continue  # its measurement failed
            if clock.left() < self._expected_seconds(cell, capacity):
                self._say(f"no time left for {cell.name}")
                break
            started = time.monotonic()
            try:
                run = self._run(cell, capacity, clock)
            except (ValueError, RuntimeError, TimeoutError) as error:
                failed[cell.name] = " ".join(str(error).split())
                _write_json(self._folder / "failed.json", failed)
                self._say(f"{cell.name}: {failed[cell.name]}")
                continue
            summary = summarize(run)
            pace = f"{saturated(run):.2f} ended" if cell.load is None else f"{_arrival_rate(run):.2f} came"
            self._say(
                f"{cell.name}: {len(run.requests)} requests, {pace} a second, {time.monotonic() - started:.1f} s, "
                f"TTFT p99 {_ms(summary['p99_ttft_ms'])}, TPOT p99 {_ms(summary['p99_tpot_ms'])}, "
                f"{folder_bytes(path) / 1e3:.0f} kB"
            )
            self._kept()
            done += 1
        return done

    def capacity(self, work: str) -> float | None:
        """Requests a second, measured; None where that failed."""
        return capacity(self._folder, work)

    def spec_of(self, cell: Cell, rate: float | None) -> RunSpec:
        """The specification of a cell; `rate` in req/s, None for the run that measures capacity."""
        work, sizes = self._works[cell.work], self._sizes
        fields: dict[str, Any] = dict(work.workload)
        fields["n"] = sizes.num_requests(work)
        if rate is None:
            fields["n"] += self._at_once(work)
            if work.at_once:
                fields["arrivals"] = "at-once"
                fields.pop("cv", None)
            else:
                fields |= arrivals_at(SPEED_UP * sizes.guess * work.pace, fields, work)
        else:
            fields |= arrivals_at(rate, fields, work)
        content = self._prepared.spec.model_dump(mode="json")
        limits = LimitsSpec.model_validate({**content["limits"], **work.limits})
        policies = {**POLICIES, **work.policies}[cell.policy]
        return check_spec(
            {
                **content,
                "workload": fields,
                "policies": {**content["policies"], **policies},
                "limits": limits.model_dump(mode="json"),
            }
        )

    def _at_once(self, work: Work) -> int:
        most = self._prepared.limits.max_num_seqs
        return most if work.at_most is None else min(most, work.at_most)

    def _expected_seconds(self, cell: Cell, capacity: float | None) -> float:
        """All arrive, and the last ones take a while."""
        work = self._works[cell.work]
        count = self._sizes.num_requests(work)
        if cell.load is None or capacity is None:
            return (count + self._at_once(work)) / (self._sizes.guess * work.pace) + 5
        return count / (min(1.0, cell.load) * capacity) + 8

    def _run(self, cell: Cell, capacity: float | None, clock: Clock) -> Run:
        rate = None if cell.load is None or capacity is None else cell.load * capacity
        spec = self.spec_of(cell, rate)
        workload = make_workload(spec.workload)
        limits = self._limits(spec)
        scratch = self._folder / SCRATCH / cell.name
        shutil.rmtree(scratch, ignore_errors=True)
        timeout = min(self._sizes.timeout_factor * self._sizes.cell_seconds + 20, clock.left())
        prepared = Prepared(spec, limits, self._costs, {})  # for policies that plan by it, as in the other panel
        run_prepared(prepared, self._loaded, scratch, workload, runner=self._runner, timeout_s=timeout)
        kept = compact_run(read_run(scratch), self._folder / "runs" / cell.name)
        shutil.rmtree(scratch)
        return kept

    def _limits(self, spec: RunSpec) -> Limits:
        """The base's, as the runtime has them, with what the cell's own differ in."""
        limits, given = self._prepared.limits, spec.limits
        num_blocks = limits.num_blocks if given.num_blocks is None else min(given.num_blocks, limits.num_blocks)
        return replace(limits, num_blocks=num_blocks, prefix_caching=given.prefix_caching)

    def _failed(self) -> dict[str, str]:
        path = self._folder / "failed.json"
        return json.loads(path.read_text()) if path.exists() else {}


def folder_bytes(folder: Path) -> int:
    """Of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def _arrival_rate(run: Run) -> float:
    arrivals = run.requests["arrival_ns"]
    return (len(arrivals) - 1) / max(1e-9, (arrivals.max() - arrivals.min()) / 1e9)


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} ms"
