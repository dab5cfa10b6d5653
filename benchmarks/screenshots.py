"""Pictures of the dashboard's pages for the documentation: `python -m benchmarks.screenshots FOLDER`.

FOLDER holds run folders, as `diptych demo` leaves them. Needs Playwright and a Chromium, as tests/dashboard does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tests.dashboard.browser import chromium, served, settled

PAGES = {
    "compare": "",
    "timeline": "timeline",
    "policies": "policies",
    "try": "try?n=400&rate=12&scheduler=sarathi,chunk_size=256&seed=1",
}


def take(page: Any, url: str, name: str, file: Path, width: int) -> None:
    """One page, from its top to its end, once its figures are drawn."""
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(url)
    if name == "try":
        page.get_by_role("button", name="Simulate").click()
        page.get_by_role("button", name="Save").wait_for(timeout=120_000)
    page.locator(".js-plotly-plot .main-svg").first.wait_for(timeout=120_000)
    settled(page)
    height = page.evaluate("document.querySelector('[data-testid=stMainBlockContainer]').scrollHeight")
    page.set_viewport_size({"width": width, "height": min(height + 10, 3200)})
    page.wait_for_timeout(1500)
    page.screenshot(path=str(file))


def main() -> None:
    """Take them all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/dashboard"))
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with served(arguments.folder) as address, chromium() as browser:
        context = browser.new_context(color_scheme="dark" if arguments.dark else "light", reduced_motion="reduce")
        page = context.new_page()
        for name, path in PAGES.items():
            file = arguments.out / f"{name}{'-dark' * arguments.dark}.png"
            take(page, f"{address}/{path}", name, file, arguments.width)
            print(f"{file}: {file.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
