"""`diptych demo`."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import TaskID

from experiments.cli.app import app, console
from experiments.cli.options import interruptible, progress
from experiments.compare import TITLES, Comparison, Pair
from experiments.render import comparison_table

if TYPE_CHECKING:
    from experiments.demo import Outcome

STEADY = ("TTFT p50", "TPOT p50", "E2E p50", "Output tokens")
"""Of the noise floor, what is said in words."""

QUESTION = "What is the capital of France, and what is it known for?"


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs and plots.")] = Path("demo"),
    model: Annotated[str, typer.Option("--model", "-m", help="The model to serve.")] = "SmolLM2-135M-Instruct",
    dummy: Annotated[bool, typer.Option(help="Random weights of the preset --model: needs no network.")] = False,
    profile_seconds: Annotated[float, typer.Option(help="How long to measure this machine.", min=1)] = 45.0,
    seconds: Annotated[float, typer.Option(help="How long each policy is to serve.", min=1)] = 36.0,
) -> None:
    """Serve and simulate one workload under two policies on this machine, and put the panels side by side.

    Example: diptych demo
    """
    from experiments.demo import LOAD, POLICIES, Demo  # torch and matplotlib are slow to import
    from experiments.plots import save_figures
    from experiments.profiling import profile

    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)  # before minutes of measuring that could not be saved
    show = Demo(out, model, "dummy" if dummy else "auto")
    console.rule("1. the model")
    loaded = show.load()
    millions = sum(p.numel() for p in loaded.model.parameters()) / 1e6
    console.print(f"{loaded.name}: {loaded.config.num_layers} layers, {millions:.0f} M parameters")
    answer = show.ask(loaded, QUESTION)
    if answer:
        console.print(f"asked: {QUESTION}\nit says: {answer}")

    console.rule("2. this machine's step times")
    with progress("measuring", 100) as bar:
        costs = profile(
            show.spec,
            profile_seconds,
            loaded=loaded,
            on_progress=lambda x: bar.update(TaskID(0), completed=round(100 * x)),
        )
    costs.save(out / "calibration.json")
    device = [error for error in costs.calibration.held_out if error.part == "device"]
    shown = ", ".join(f"{error.regime} {100 * error.mean:.1f}%" for error in device)
    console.print(f"cost model fitted; mean error on held-out steps: {shown}. Saved: {out / 'calibration.json'}")

    workload = show.make_workload(loaded, costs, seconds)
    console.print(
        f"workload: {len(workload)} requests of Azure's chat lengths, scaled by 0.1, {show.spec.workload.rate:.2f} a "
        f"second on average ({LOAD:.0%} of what the simulator says this machine can bear; as drawn {workload.rate:.2f})"
    )
    comparisons = []
    for number, policy in enumerate(POLICIES, 3):
        console.rule(f"{number}. policy: {policy}")
        again = policy == POLICIES[-1]
        if again:
            console.print(
                "served twice: what differs from one time to the next is the machine, and no simulation's error"
            )
        with interruptible(out / f"{policy}-real"), progress("serving", len(workload) * (1 + again)) as bar:

            def on_output(output: object, bar: object = bar) -> None:
                if getattr(output, "finish_reason", None) is not None:
                    bar.advance(TaskID(0))  # type: ignore[attr-defined]

            outcome = show.serve_and_simulate(policy, loaded, workload, costs, on_output, again)
        _report(outcome)
        comparisons.append(outcome.comparison)
        save_figures(outcome.comparison, out / f"{policy}-plots")

    console.rule("done")
    console.print(f"{POLICIES[-1]} in place of {POLICIES[0]}: {_what_the_policy_does(*comparisons)}")
    console.print(f"It took {time.monotonic() - started:.0f} s. Runs and plots: {out}")
    console.print(
        "Next, answer for hardware you do not have:  diptych simulate --workload chat -n 2000 --rate 8 "
        "--model llama-3.1-8b --device h100-sxm"
    )
    command = "diptych" if shutil.which("diptych") else sys.argv[0]
    console.print(f"See both panels at once:  {command} dashboard {out}")


def _what_the_policy_does(first: Comparison, second: Comparison) -> str:
    """By how much the second policy's medians are off the first's, served and simulated."""
    panels = []
    for panel, side in (("served", "a"), ("simulated", "b")):
        pairs = {
            name: Pair(getattr(first.latencies[name]["p50"], side), getattr(second.latencies[name]["p50"], side))
            for name in ("ttft", "e2el")
        }
        shown = (f"{TITLES[name]} p50 {pair.error:+.0%}" for name, pair in pairs.items() if pair.error is not None)
        panels.append(f"{panel}, {' and '.join(shown)}")
    return "; ".join(panels)


def _report(outcome: Outcome) -> None:
    console.print(comparison_table(outcome.comparison, outcome.noise))
    if outcome.noise:
        named = {name: outcome.noise[name] for name in STEADY if name in outcome.noise}
        shown = ", ".join(f"{name} {floor:.1%}" for name, floor in named.items())
        console.print(f"noise floor: served again, this machine was off by {shown}. An error below that says nothing.")
    if outcome.divergence is None:
        console.print(f"decision replay: zero divergences in {outcome.replayed_steps} steps", style="green")
    else:
        console.print(f"decision replay: the panels differ. {outcome.divergence}", style="red")
