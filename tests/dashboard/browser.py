"""A real browser on a real dashboard: Chromium from the system or from Playwright's own download, headless."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@contextmanager
def served(root: Path) -> Iterator[str]:
    """A dashboard over a folder, as its users start it; gives its address."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "dashboard", str(root), "--port", str(port)])
    try:
        deadline = time.monotonic() + 120
        while not healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the dashboard over {root} did not start")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


@contextmanager
def chromium(profile: Path | None = None, **options: Any) -> Iterator[Any]:
    """A browser of Playwright's; with a folder for its profile a context, which keeps there what a user's browser does,
    scripts in their compiled form included. Raises RuntimeError, with what to install, where there is none."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise RuntimeError("there is no Playwright; pip install -e '.[dev]'") from None
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    with sync_playwright() as playwright:
        try:
            options |= {"executable_path": found, "args": ["--no-sandbox", "--disable-dev-shm-usage"]}
            if profile is None:
                browser = playwright.chromium.launch(**options)
            else:
                browser = playwright.chromium.launch_persistent_context(profile, **options)
        except Error as error:
            why = str(error).splitlines()[0]
            raise RuntimeError(f"there is no Chromium; apt install chromium, or playwright install: {why}") from None
        try:
            yield browser
        finally:
            browser.close()


def settled(page: Any) -> None:
    """Wait until the script has run and its charts are drawn; fail where a page shows an exception."""
    page.wait_for_selector('[data-testid="stApp"][data-test-script-state="notRunning"]', timeout=60_000)
    page.wait_for_timeout(400)
    assert page.locator('[data-testid="stException"]').count() == 0, page.locator(
        '[data-testid="stException"]'
    ).inner_text()
