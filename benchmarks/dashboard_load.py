"""How long the dashboard's pages take to open in a browser: `python -m benchmarks.dashboard_load --out FILE`.

Two simulated runs of 20,000 requests, of which the second has over 100,000 steps, are made once in --folder. Each page
is opened in a headless Chromium as if by a copied link: once cold (`first`: the server has read nothing yet), then
again several times in new tabs (`again`), when the server keeps what it has read and the browser the page's scripts. A
page is open when its script has ended and every figure is drawn. Needs Playwright and a Chromium, as tests/dashboard
does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
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

OPEN = """figures => {
    const app = document.querySelector('[data-testid="stApp"]');
    const plots = [...document.querySelectorAll('.js-plotly-plot')];
    const drawn = plots.filter(plot => plot.querySelector('.xtick'));
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


def opened(context: Any, url: str, figures: int) -> dict[str, float]:
    """Seconds until the page is open, seconds of computing for it on both sides, and what came to it by then: messages
    of the script, and their bytes."""
    page = context.new_page()
    before = cpu_seconds()
    sizes: list[int] = []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: sizes.append(len(frame))))
    begin = time.perf_counter()
    page.goto(url, wait_until="commit")
    page.locator('[data-testid="stMainBlockContainer"]').first.wait_for(timeout=120_000)
    framed = time.perf_counter()
    page.wait_for_function(OPEN, arg=figures, timeout=600_000, polling=20)
    end = time.perf_counter()
    after = cpu_seconds()
    nodes = page.evaluate("document.querySelectorAll('*').length")
    page.close()
    return {
        "seconds": round(end - begin, 3),
        "seconds_to_frame": round(framed - begin, 3),
        **{f"{side}_cpu_seconds": round(after[side] - before[side], 2) for side in before},
        "messages": len(sizes),
        "kilobytes": round(sum(sizes) / 1e3, 1),
        "elements": nodes,
    }


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/dashboard-load"), help="where the two runs are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/dashboard_load.json"))
    parser.add_argument("--times", type=int, default=5, help="how often each page is opened after the first time")
    parser.add_argument("--pages", nargs="*", default=list(PAGES), choices=list(PAGES))
    arguments = parser.parse_args()
    sizes, load = make_runs(arguments.folder), os.getloadavg()[0]
    pages: dict[str, Any] = {}
    with served(arguments.folder) as address, chromium() as browser:
        version = browser.version
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        for name, (path, figures) in PAGES.items():
            if name not in arguments.pages:
                continue
            first = opened(context, f"{address}/{path}", figures)
            again = [opened(context, f"{address}/{path}", figures) for _ in range(arguments.times)]
            middle = statistics.median(each["seconds"] for each in again)
            pages[name] = {"limit_s": LIMIT_S[name], "median_s": middle, "first": first, "again": again}
            print(
                f"{name}: first {first['seconds']:.2f} s, again {middle:.2f} s (limit {LIMIT_S[name]:g} s)", flush=True
            )
    about = {"chromium": version, "machine": platform.machine(), "cores": os.cpu_count(), "load_at_start": load}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"about": about, "runs": sizes, "pages": pages}, indent=2) + "\n")
    print(arguments.out)


if __name__ == "__main__":
    main()
