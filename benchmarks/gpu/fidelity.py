"""How far the simulator is from the runtime on this card: `python -m benchmarks.gpu.fidelity [--time-limit 540]`.

For each model (random weights, bfloat16, forced lengths): profiles the runtime, measures the capacity of each workload,
runs as much of the matrix of workloads, loads and policies as the time allows, the most telling cells first, then
replays and simulates every record, and prints the four levels of docs/fidelity.md. Results go into
DIPTYCH_BENCH_OUT/fidelity/MODEL (else benchmarks/results/fidelity/MODEL); what is there is kept, so the next call goes
on. Beside that folder, fidelity.tar has all of it in one file, renewed after every run, and fidelity-MODEL.md the
tables. `--resume FILE` goes on from such a file. `--only-real`: no simulated half, all of the time is for runs.
`--from-records`: only the simulated half, without a card; with `--refit`, after fitting the cost models anew to the
steps that were profiled.

`--trace chat=FILE` takes a workload's lengths from a trace (chat, code: Azure's CSV files; sharegpt: a file of lengths)
instead of the generator fitted to it. `--small`: a tiny model on the CPU, to see that all of it works.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.gpu.results import out_folder
from experiments.fidelity.archive import pack, unpack
from experiments.fidelity.matrix import QUICK_SIZES, Sizes
from experiments.fidelity.sim_half import evaluate
from experiments.fidelity.tables import markdown
from experiments.fidelity.validation import full, measure, quick, trace_files
from experiments.records import RunError
from experiments.refitting import refit
from experiments.spec import SpecError

MODELS = ("llama-3.1-8b", "qwen3-0.6b")
EVALUATION_S = 40.0
"""Kept back for the simulated half."""
GUESSES = {"llama-3.1-8b": 20.0, "qwen3-0.6b": 60.0}
"""Capacity in requests/s, roughly: how fast requests come that are to come at once and cannot."""


def validate(model: str, results: Path, seconds: float, options: argparse.Namespace) -> None:
    """One model, both halves; whatever happens, what was measured is in the archive."""
    started = time.monotonic()
    folder = results / model

    def keep() -> None:
        pack(results, results.with_suffix(".tar"))

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {line}", flush=True)

    if options.small:
        base, works, cells = quick()
        sizes = QUICK_SIZES
    else:
        base, works, cells = full(model, options.device, trace_files(options.trace))
        sizes = Sizes(options.profile_seconds, options.cell_seconds, guess=GUESSES.get(model, 20.0))
    if not options.from_records:
        kept_back = 0.0 if options.only_real else EVALUATION_S
        measure(base, works, cells, folder, sizes, limit_s=seconds - kept_back, say=say, kept=keep)
    if options.only_real:
        return
    if options.refit:
        for path in sorted((folder / "calibrations").glob("*.json")):
            refit(path).save(path)
            say(f"fitted {path.name} anew")
    found = evaluate(folder, processes=options.processes, say=say)
    keep()
    for path in (folder / "fidelity.md", results.parent / f"fidelity-{model}.md"):
        path.write_text(markdown(found))
    keep()
    say(f"evaluated {len(found['cells'])} cells")
    print(f"\n### {model}\n\n{markdown(found)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="presets, with commas (default: %(default)s)")
    parser.add_argument("--time-limit", type=float, default=540, help="seconds for all of it (default: %(default)s)")
    parser.add_argument("--profile-seconds", type=float, default=100)
    parser.add_argument("--cell-seconds", type=float, default=20, help="of arrivals (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="of all models, in place of the usual one")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="the fidelity.tar of a call before")
    parser.add_argument("--trace", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), help="for the simulated half")
    half = parser.add_mutually_exclusive_group()
    half.add_argument("--only-real", action="store_true", help="measure, and evaluate elsewhere")
    half.add_argument("--from-records", action="store_true")
    parser.add_argument("--refit", action="store_true", help="fit cost models anew to the profiled steps")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    models = ["tiny"] if options.small else options.models.split(",")
    started = time.monotonic()
    results = options.results or out_folder() / "fidelity"
    if options.resume is not None:
        unpack(options.resume, results.parent)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; what was measured is in fidelity.tar"))
    for i, model in enumerate(models):
        left = options.time_limit - (time.monotonic() - started)
        if left < 2 * EVALUATION_S:
            sys.exit(f"no time left for {model}")
        validate(model, results, left / (len(models) - i), options)


if __name__ == "__main__":
    try:
        main()
    except (SpecError, RunError) as error:
        sys.exit(f"fidelity: {error}")
