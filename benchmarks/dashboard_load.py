"""How long the dashboard's pages take to open in a browser: `python -m benchmarks.dashboard_load --out FILE`.

Two simulated runs of 20,000 requests, of which the second has over 100,000 steps, are made once in --folder. Each page
is opened in a headless Chromium with a profile on disk: for the first time, when the server has read nothing yet; then
again several times as if by a copied link, in new tabs (`new_tab`), and by the bar from another page of the same tab
(`from_another_page`). A page is open when its script has ended and every figure is drawn. Other work on the machine
makes it slower: the load is noted, and how much computing each opening took, which depends on that less. Needs
Playwright and a Chromium, as tests/dashboard does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from experiments.records import read_run
from experiments.simulated import run_simulated
from experiments.spec import check_spec
from tests.dashboard.browser import chromium, served

REQUESTS = 20_000
RUNS = {"few steps": "mixed", "many steps": "sarathi,chunk_size=256"}
PAGES = {
    "compare": ("?a=few+steps&b=many+steps", 2),
    "timeline": ("timeline?a=many+steps&b=few+steps", 2),
}
"""Page -> what is opened, and how many figures it has."""
LIMIT_S = {"compare": 2.0, "timeline": 3.0}

MARK = {"compare": ".dp-tiles", "timeline": ".st-key-traces"}
"""Page -> what only it has."""

HOW = ("new_tab", "from_another_page")

OPEN = """figures => {
    const app = document.querySelector('[data-testid="stApp"]');
    const plots = [...document.querySelectorAll('.js-plotly-plot')];
    const drawn = plots.filter(plot => plot.querySelector('.cartesianlayer .trace'));
    return app && app.dataset.testScriptState === 'notRunning' && drawn.length >= figures;
}"""


def make_runs(folder: Path) -> dict[str, dict[str, int]]:
    """Simulate what is not there yet; their sizes."""
    sizes = {}
    for name, scheduler in RUNS.items():
        if not (folder / name / "run.json").exists():
            print(f"simulating {name}", flush=True)
            workload = {"name": "chat", "n": REQUESTS, "rate": 24.0}
            run_simulated(
                check_spec({"target": "sim", "workload": workload, "policies": {"scheduler": scheduler}}), folder / name
            )
        run = read_run(folder / name)
        sizes[name] = {"requests": len(run.requests), "steps": len(run.steps)}
    return sizes


def processor() -> str:
    """The processor's name, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def cpu_seconds() -> dict[str, float]:
    """Computing so far by the processes that this one has started: the dashboard's server and the browser's."""
    total = {"server": 0.0, "browser": 0.0}
    for process in psutil.Process().children(recursive=True):
        try:
            times, command = process.cpu_times(), " ".join(process.cmdline())
        except psutil.Error:
            continue
        side = "server" if "streamlit" in command or "dashboard" in command else "browser"
        total[side] += times.user + times.system
    return total


def opened(page: Any, go: Callable[[], object], figures: int) -> dict[str, float]:
    """Seconds until the page to which `go` leads is open, and seconds of computing for it on both sides."""
    before = cpu_seconds()
    begin = time.perf_counter()
    go()
    page.locator(".dp-tile, .js-plotly-plot").first.wait_for(timeout=600_000)
    seen = time.perf_counter()
    page.wait_for_function(OPEN, arg=figures, timeout=600_000, polling=50)
    end = time.perf_counter()
    after = cpu_seconds()
    return {
        "seconds": round(end - begin, 3),
        "seconds_to_first_content": round(seen - begin, 3),
        **{f"{side}_cpu_seconds": round(after[side] - before[side], 2) for side in before},
        "load": round(os.getloadavg()[0], 2),
    }


def in_a_new_tab(context: Any, url: str, figures: int) -> dict[str, float]:
    """As by a copied link."""
    page = context.new_page()
    found = opened(page, lambda: page.goto(url, wait_until="commit"), figures)
    page.close()
    return found


def from_another_page(context: Any, address: str, name: str, times: int) -> list[dict[str, float]]:
    """By the dashboard's own bar, in a tab that shows the same runs on another page."""
    page, other = context.new_page(), next(each for each in PAGES if each != name)
    page.goto(f"{address}/{PAGES[other][0]}")
    found = []
    for _ in range(times):
        page.wait_for_function(OPEN, arg=PAGES[other][1], timeout=600_000, polling=50)
        found.append(opened(page, lambda: _follow(page, name), PAGES[name][1]))
        _follow(page, other)
    page.close()
    return found


def _follow(page: Any, name: str) -> None:
    """Click on the bar's link, and wait until the page has begun to change."""
    page.get_by_role("link", name=name.capitalize()).click()
    page.locator(MARK[name]).wait_for(timeout=600_000)
    for other in PAGES.keys() - {name}:
        page.locator(MARK[other]).wait_for(state="detached", timeout=600_000)


def payload(context: Any, url: str, figures: int) -> dict[str, float]:
    """What comes to a page: messages of its script and their bytes, and how many elements it has in the end."""
    page, sizes = context.new_page(), []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: sizes.append(len(frame))))
    page.goto(url)
    page.wait_for_function(OPEN, arg=figures, timeout=600_000, polling=50)
    elements = page.evaluate("document.querySelectorAll('*').length")
    page.close()
    return {"messages": len(sizes), "kilobytes": round(sum(sizes) / 1e3, 1), "elements": elements}


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/dashboard-load"), help="where the two runs are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/dashboard-load.json"))
    parser.add_argument("--times", type=int, default=5, help="how often each page is opened after the first time")
    parser.add_argument("--pages", nargs="*", default=list(PAGES), choices=list(PAGES))
    arguments = parser.parse_args()
    sizes, load = make_runs(arguments.folder), os.getloadavg()[0]
    pages: dict[str, Any] = {}
    options = {"viewport": {"width": 1280, "height": 900}}
    with (
        TemporaryDirectory() as profile,
        served(arguments.folder) as address,
        chromium(Path(profile), **options) as context,
    ):
        version = context.browser.version if context.browser else ""
        for name in arguments.pages:
            url, figures = f"{address}/{PAGES[name][0]}", PAGES[name][1]
            found: dict[str, Any] = {"limit_s": LIMIT_S[name], "first": in_a_new_tab(context, url, figures)}
            in_a_new_tab(context, url, figures)  # a browser keeps a script's compiled form from the second time on
            found["new_tab"] = [in_a_new_tab(context, url, figures) for _ in range(arguments.times)]
            found["from_another_page"] = from_another_page(context, address, name, arguments.times)
            found["payload"] = payload(context, url, figures)
            medians = {how: statistics.median(each["seconds"] for each in found[how]) for how in HOW}
            pages[name] = {"median_s": medians, **found}
            print(f"{name}: {found['first']['seconds']} s, then {medians} (limit {LIMIT_S[name]:g} s)", flush=True)
    about = {
        "chromium": version,
        "machine": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_at_start": load,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"about": about, "runs": sizes, "pages": pages}, indent=2) + "\n")
    print(arguments.out)


if __name__ == "__main__":
    main()
