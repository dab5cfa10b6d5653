"""`diptych tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import TaskID

from experiments.cli.app import app, complain, console
from experiments.cli.failures import INTERRUPTED
from experiments.cli.options import Processes, RayAddress, ResultFolder, progress
from experiments.cli.sweeping import check_places, on_cluster
from experiments.records.environment import usable_cores
from experiments.sweeps import LocalRunner
from experiments.sweeps.cell_run import write_json
from experiments.tuning.search import Trial, read_tuning, search


@app.command()
def tune(
    file: Annotated[Path, typer.Argument(help="A YAML file: base, search, objectives.")],
    out: ResultFolder = None,
    processes: Processes = None,
    ray: RayAddress = None,
) -> None:
    """Search policies' knobs and any other fields of a run for what is best by one figure, or by two: the Pareto front.

    The search is a function of the file: stopped, it goes on with the same command, and runs that the folder holds are
    kept. Needs the extra `tune` (optuna).

    Example: diptych tune examples/tune.yaml -o sweeps/chunk-size
    """
    asked = read_tuning(file)
    check_places(ray, processes)
    folder = out or Path("sweeps") / file.stem
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tune.json", {"tune": {**asked.spec.model_dump(mode="json"), "base": asked.base}})
    with LocalRunner(processes or usable_cores()) as local, progress("tuning", asked.spec.trials) as bar:
        runner: Any = local if ray is None else on_cluster(ray)

        def say(trial: Trial) -> None:
            if trial.error:
                complain(f"trial {trial.number} failed: {trial.error}")
            bar.update(TaskID(0), completed=trial.number + 1)

        try:
            trials = search(asked, folder, runner, say)
        except KeyboardInterrupt:
            complain(f"interrupted; the runs that have ended are in {folder}, and the same command goes on from there")
            raise typer.Exit(INTERRUPTED) from None
    from experiments.tuning.output import markdown, write  # matplotlib is slow to import

    write(trials, asked.spec, folder)
    console.print(markdown(trials, asked.spec))
    console.print(f"Trials: {folder / 'trials.parquet'} (and .csv). Figure: {folder / 'front.png'} (and .pdf)")
    if all(trial.error for trial in trials):
        raise typer.Exit(1)
