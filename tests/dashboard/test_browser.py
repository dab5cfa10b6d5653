"""Every page in a real browser, on real run folders."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import openai
import pandas as pd
import pytest

from experiments.metrics import per_request
from experiments.records import read_run
from experiments.series import request_pairs
from tests.dashboard.browser import settled
from tests.runtime.serving.conftest import make_model
from tests.runtime.serving.running import ADMIN_KEY, running

pytestmark = pytest.mark.timeout(300)


def opened(page: Any, url: str) -> None:
    page.goto(url)
    page.locator(".js-plotly-plot .main-svg").first.wait_for(timeout=60_000)
    settled(page)


def in_url(page: Any) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(urlsplit(page.url).query).items()}


def pick(page: Any, box: int, text: str) -> None:
    """Choose in a selectbox, with the keyboard."""
    field = page.locator('[data-testid="stSelectbox"] input').nth(box)
    field.click()
    field.fill(text)
    field.press("Enter")


def saved(page: Any, file: str) -> bytes:
    """What the button for this file gives."""
    with page.expect_download() as waiting:
        page.locator(f".st-key-{file.replace('.', '-')} button").click()
    assert waiting.value.suggested_filename == file
    return Path(waiting.value.path()).read_bytes()


def drawn_over(page: Any, begin: float, end: float) -> None:
    """Draw a frame with the mouse over a part of the first panel of the page's first figure."""
    panel = page.locator(".js-plotly-plot .nsewdrag").first
    panel.scroll_into_view_if_needed()
    box = panel.bounding_box()
    page.mouse.move(box["x"] + begin * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + end * box["width"], box["y"] + 0.7 * box["height"], steps=5)
    page.mouse.up()
    page.wait_for_timeout(500)


def range_of(page: Any) -> list[float]:
    """Of the x axis of the page's first figure."""
    return [float(x) for x in page.evaluate("document.querySelector('.js-plotly-plot')._fullLayout.xaxis.range")]


def test_compare_shows_two_runs_and_saves_what_it_shows(page: Any, address: str, runs: Path) -> None:
    opened(page, f"{address}/?a=model&b=gpu&by=tpot_ms")
    assert in_url(page) == {"a": "model", "b": "gpu", "by": "tpot_ms"}
    boxes = page.locator('[data-testid="stSelectbox"] input')
    assert [boxes.nth(i).input_value() for i in (0, 1)] == ["model (sim)", "gpu (real)"]
    assert "TPOT, simulated (ms)" in page.locator(".dp-table").first.inner_text()
    assert page.locator(".js-plotly-plot").count() == 2
    assert page.locator(".dp-tile").count() == 5
    assert "1 folder cannot be read" in page.locator('[data-testid="stExpander"]').first.inner_text()
    before = range_of(page)
    drawn_over(page, 0.3, 0.6)
    low, high = range_of(page)
    assert before[0] < low < high < before[1]

    assert saved(page, "latency.png").startswith(b"\x89PNG")
    assert b"<svg" in saved(page, "requests.svg")[:600]
    saved_pairs = pd.read_csv(io.BytesIO(saved(page, "worst.csv")))
    by_id = per_request(read_run(runs / "gpu")).set_index("request_id")["tpot_ms"]
    assert (saved_pairs["b"].to_numpy() == by_id[saved_pairs["request_id"]].to_numpy()).all()

    page.get_by_role("radio", name="TTFT").or_(page.get_by_role("button", name="TTFT")).first.click()
    page.wait_for_url("**by=ttft_ms**")
    settled(page)
    assert "TTFT, real (ms)" in page.locator(".dp-table").first.inner_text()

    pick(page, 1, "model (sim)")
    page.wait_for_url("**b=model**")
    settled(page)
    page.get_by_text("Choose two different runs.").wait_for()


def test_the_timeline_is_zoomed_with_the_mouse_and_follows_a_request(page: Any, address: str, runs: Path) -> None:
    opened(page, f"{address}/?a=gpu&b=model&by=e2e_ms")
    page.locator(".dp-table a").first.click()
    page.wait_for_url("**/timeline?a=gpu&b=model&request=*")
    page.locator(".js-plotly-plot .main-svg").first.wait_for(timeout=60_000)
    settled(page)
    pairs = request_pairs(per_request(read_run(runs / "gpu")), per_request(read_run(runs / "model")), "e2e_ms")
    assert in_url(page)["request"] == str(pairs["request_id"][0])
    drawn_over(page, 0.4, 0.6)
    page.wait_for_url("**to=*", timeout=30_000)
    settled(page)
    whole = read_run(runs / "gpu").steps["end_ns"].max() / 1e9
    assert 0.3 * whole < float(in_url(page)["from"]) < float(in_url(page)["to"]) < 0.7 * whole
    assert saved(page, "timeline.svg").find(b"<svg") >= 0
    page.get_by_role("button", name="Whole run").click()
    page.wait_for_function("!location.search.includes('from=')")
    settled(page)
    page.get_by_role("link", name="Compare").click()
    page.locator(".dp-tile").first.wait_for()
    assert in_url(page)["b"] == "model"


def test_both_runs_go_along_from_page_to_page(page: Any, address: str) -> None:
    """A new page's box would begin with the first run of the list."""
    opened(page, f"{address}/timeline?a=model&b=gpu")
    for name in ("Compare", "Timeline"):
        page.get_by_role("link", name=name).click()
        page.wait_for_url(f"**{'/timeline' if name == 'Timeline' else '/'}?a=*")
        page.locator(".dp-tile" if name == "Compare" else ".st-key-traces").first.wait_for()
        settled(page)
        assert {key: in_url(page)[key] for key in ("a", "b")} == {"a": "model", "b": "gpu"}


def test_policies_are_ranked_and_a_run_leads_to_its_timeline(page: Any, address: str) -> None:
    opened(page, f"{address}/policies?objective=p99_e2el_ms")
    assert in_url(page)["objective"] == "p99_e2el_ms"
    pick(page, 1, "output tokens (tok/s)")
    page.wait_for_url("**objective=output_throughput**")
    settled(page)
    first = page.locator(".dp-table").last.locator("a").first
    assert first.inner_text() == "model"
    assert saved(page, "pareto.png").startswith(b"\x89PNG")
    assert saved(page, "runs.csv").startswith(b"run,kind,policy")
    first.click()
    page.wait_for_url("**/timeline?a=model**")
    settled(page)


def test_a_simulation_is_started_watched_and_cancelled(page: Any, address: str) -> None:
    page.goto(f"{address}/try?n=20000&rate=20&seed=1")
    page.get_by_role("button", name="Simulate").click()
    page.get_by_text("requests have ended").wait_for(timeout=60_000)
    page.locator(".js-plotly-plot .main-svg").first.wait_for(timeout=60_000)  # partial curves
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Cancelled:").wait_for(timeout=60_000)
    settled(page)
    assert page.locator(".dp-tile").count() == 5


TWO_LINES = """(document.querySelector('.js-plotly-plot')?.calcdata ?? [[], []])
    .slice(0, 2).map(line => line.map(at => at.y || 0))"""
"""The first two lines of the page's first figure, as drawn; empty while there is none."""


@contextmanager
def clients(url: str, count: int = 3) -> Iterator[None]:
    """So many at a time that ask again and again, with the openai package, while the server answers."""
    over = threading.Event()

    def ask(number: int) -> None:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        while not over.is_set():
            try:
                client.completions.create(model="babel", prompt=f"{number} asks for more", max_tokens=12, seed=number)
            except openai.APIError:
                return

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_a_server_and_its_twin_are_watched_until_the_server_is_gone(page: Any, address: str, tmp_path: Path) -> None:
    page.goto(f"{address}/live?server=http://127.0.0.1:9&window=30")
    page.get_by_role("button", name="Attach").click()
    page.get_by_text("nothing answers at http://127.0.0.1:9").wait_for(timeout=60_000)
    cost = ("--set", "cost.kind=constant", "--set", "cost.step_ms=5")
    with running(make_model(tmp_path / "babel"), *cost, num_blocks=64, max_num_seqs=2, max_model_len=256) as server:
        assert server.operators_info()["engines"][0]["cost"] == {
            "kind": "constant",
            "ns": 5_000_000,
            "swap_ns_per_token": 0,
        }
        assert "cost" not in server.info()["engines"][0]
        with clients(server.url):
            page.get_by_label("Server").fill(server.url)
            page.get_by_label("Operator's key").fill(ADMIN_KEY)
            page.get_by_role("button", name="Attach").click()
            page.locator(".js-plotly-plot .main-svg").first.wait_for(timeout=60_000)
            # Both sides' output tokens are above 0, and change.
            page.wait_for_function(f"{TWO_LINES}.every(y => Math.max(...y) > 0)", timeout=60_000)
            before = page.evaluate(TWO_LINES)
            moved = f"before => {TWO_LINES}.every((y, at) => String(y) != String(before[at]))"
            page.wait_for_function(moved, arg=before, timeout=60_000)
            page.get_by_text("Error so far").wait_for(timeout=60_000)
            rows = page.locator(".dp-table tr").all_inner_texts()
            assert [row.split("\t")[0] for row in rows[1:]] == [
                f"{x} {y}" for x in ("TTFT", "TPOT", "E2E") for y in ("mean", "p99")
            ]
            assert rows[3].split("\t")[2] == "5.000"  # with never more than two requests each token takes a step
    page.get_by_text(f"nothing answers at {server.url}").wait_for(timeout=60_000)
    assert page.locator(".js-plotly-plot").count() == 1
    assert in_url(page) == {"server": server.url, "window": "30", "cost": "stated"}
    assert page.locator('[data-testid="stException"]').count() == 0
