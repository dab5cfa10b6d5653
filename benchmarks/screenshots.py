"""Pictures of the dashboard's pages for the documentation: `python -m benchmarks.screenshots [FOLDER]`.

FOLDER holds run folders, as `diptych demo` leaves them; by default runs that were recorded on an H100 for
docs/fidelity.md, beside simulations of them. The page "Live" is that of a small random model, served on this
machine's CPU, and of its twin with step times that are measured first. Needs Playwright and a Chromium, as
tests/dashboard does.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx2

from experiments.fidelity.sim_half import calibration_of
from experiments.profiling import profile
from experiments.records import read_run
from experiments.replaying import simulate_record
from experiments.spec import check_spec
from tests.dashboard.browser import chromium, served, settled
from tests.runtime.serving.conftest import make_model
from tests.runtime.serving.running import ADMIN_KEY, running

PAGES = {
    "compare": "",
    "timeline": "timeline",
    "policies": "policies",
    "sweep": "policies?workload=all+workloads",
    "try": "try?n=400&rate=12&scheduler=sarathi,chunk_size=256&seed=1",
    "live": "live?window=30&server=",
}
RECORDS = Path(__file__).parent / "results" / "fidelity"
SHOWN = {
    "llama-3.1-8b": (
        *(f"chat~{load}~mixed~0" for load in ("0.5", "0.7", "0.85", "1.1", "1.5")),
        *(f"chat~0.95~{name}~0" for name in ("edf", "mixed", "preemptive", "prefill_first", "sarathi", "sjf", "vtc")),
    ),
    "qwen3-0.6b": tuple(f"chat~0.95~{name}~0" for name in ("edf", "mixed", "prefill_first", "sarathi", "sjf")),
}
"""Runs of `RECORDS`, by model: one policy at several loads, and several policies at one."""
LIMITS = {"num_blocks": 96, "max_num_seqs": 8, "max_model_len": 512}
"""Of the server that the page "Live" shows."""
PROFILED_S = 10
"""How long its steps are measured, for its twin."""
WATCHED_S = 30
"""How long the live page is watched before its picture is taken."""


def recorded_runs(folder: Path) -> None:
    """Fill a folder with the runs of `SHOWN`, and a simulation of each by its calibration."""
    for model, names in SHOWN.items():
        for name in names:
            work, load, policy, _ = name.split("~")
            label = f"{model}-{work}-{float(load):.0%}-{policy}".replace("%", "")
            shutil.copytree(RECORDS / model / "runs" / name, folder / f"{label}-real")
            run = read_run(folder / f"{label}-real")
            simulate_record(run, calibration_of(RECORDS / model, run), folder / f"{label}-sim")


@contextmanager
def loaded_server() -> Iterator[str]:
    """A small server under a Poisson load, two requests a second; gives its address."""
    over, draw = threading.Event(), random.Random(1)

    def ask(url: str, body: dict[str, object]) -> None:
        try:
            httpx2.post(f"{url}/v1/completions", json=body, timeout=60)
        except httpx2.HTTPError:
            return  # the server is ended under it

    def load(url: str) -> None:
        while not over.wait(draw.expovariate(2.0)):
            prompt = [draw.randrange(400) for _ in range(draw.randint(5, 80))]
            body = {"prompt": prompt, "max_tokens": draw.randint(20, 120), "ignore_eos": True}
            threading.Thread(target=ask, args=(url, body), daemon=True).start()

    with tempfile.TemporaryDirectory() as folder:
        model, calibration = make_model(Path(folder) / "babel"), Path(folder) / "calibration.json"
        about = {"model": {"source": str(model)}, "limits": LIMITS, "workload": {"name": "fixed", "n": 1}}
        profile(check_spec(about), PROFILED_S).save(calibration)
        cost = ("--set", "cost.kind=fitted", "--set", f"cost.calibration={calibration}")
        with running(model, *cost, **LIMITS) as server:
            yield from _under_load(server.url, load, over)


def _under_load(url: str, load: Callable[[str], None], over: threading.Event) -> Iterator[str]:
    thread = threading.Thread(target=load, args=(url,))
    thread.start()
    try:
        yield url
    finally:
        over.set()
        thread.join()


def take(page: Any, url: str, name: str, file: Path, width: int) -> None:
    """One page, from its top to its end, once its figures are drawn."""
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(url)
    if name == "try":
        page.get_by_role("button", name="Simulate").click()
        page.get_by_role("button", name="Save").wait_for(timeout=300_000)
    if name == "live":
        page.get_by_label("Operator's key").fill(ADMIN_KEY)
        page.get_by_role("button", name="Attach").click()
        page.get_by_text("Error so far").wait_for(timeout=300_000)
        time.sleep(WATCHED_S)
    page.locator(".js-plotly-plot .main-svg").first.wait_for(timeout=300_000)
    if name != "live":  # whose script runs again and again
        settled(page)
    height = page.evaluate("document.querySelector('[data-testid=stMainBlockContainer]').scrollHeight")
    page.set_viewport_size({"width": width, "height": min(height + 10, 3200)})
    page.wait_for_timeout(1500)
    idle = "document.querySelector('[data-testid=stApp]').dataset.testScriptState === 'notRunning'"
    page.wait_for_function(idle, polling=50)  # while the script runs, what is there from before is pale
    page.screenshot(path=str(file))


def main() -> None:
    """Take them all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="run folders (default: recorded on an H100)")
    parser.add_argument("--out", type=Path, default=Path("docs/dashboard"))
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--pages", nargs="*", default=list(PAGES), choices=list(PAGES))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as opened:
        if arguments.folder is None:
            recorded_runs(Path(scratch))
        address = opened.enter_context(served(arguments.folder or Path(scratch)))
        browser = opened.enter_context(chromium())
        context = browser.new_context(color_scheme="dark" if arguments.dark else "light", reduced_motion="reduce")
        context.set_default_timeout(300_000)  # a busy machine is slow
        page = context.new_page()
        for name, path in PAGES.items():
            if name not in arguments.pages:
                continue
            file = arguments.out / f"{name}{'-dark' * arguments.dark}.png"
            with loaded_server() if name == "live" else nullcontext("") as url:
                take(page, f"{address}/{path}{url}", name, file, arguments.width)
            print(f"{file}: {file.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
