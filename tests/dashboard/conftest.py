"""One browser for the tests of a file, and one dashboard over runs of a model whose steps take a fixed time.

Not for the whole session: Playwright keeps an event loop in the thread, which tests of asyncio must not find there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dashboard.browser import chromium, served
from tests.experiments.fake_run import constant, fake_run, random_requests


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    started = chromium()
    try:
        running = started.__enter__()
    except RuntimeError as error:
        pytest.skip(str(error))
    yield running
    started.__exit__(None, None, None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run, its simulation, and one that cannot be read."""
    root = tmp_path_factory.mktemp("served")
    requests = random_requests(80, seed=2, cancelled=0.1)
    fake_run(root / "gpu", requests, kind="real")
    fake_run(root / "model", requests, step_ns=lambda step: constant(step) * 9 // 10)
    (root / "broken").mkdir()
    (root / "broken" / "run.json").write_text("{")
    return root


@pytest.fixture(scope="module")
def address(runs: Path, browser: Any) -> Iterator[str]:
    """Of a dashboard over them; asked for after the browser, so that nothing starts where there is none."""
    with served(runs) as url:
        yield url


@pytest.fixture(scope="module")
def shared_page(browser: Any) -> Iterator[Any]:
    """One for all tests of a file: what it has loaded of the dashboard itself stays in its cache."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(60_000)
    yield context.new_page()
    context.close()


@pytest.fixture
def page(shared_page: Any) -> Iterator[Any]:
    """It, of a common size. Every address that it is sent to begins a session of its own."""
    yield shared_page
    shared_page.goto("about:blank")
