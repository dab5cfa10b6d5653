"""What comes from outside is checked, and said in one line."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from experiments.live import costs
from experiments.live.server import About, Engine, LiveError, LiveServer, ServerGone
from simulator.costs.constant import ConstantCost
from simulator.costs.roofline import RooflineCost
from tests.simulator.test_costs_fitted import EXACT


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Silent."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "file:///etc/passwd", "http://[::1"])
def test_what_is_no_address_is_said(url: str) -> None:
    with pytest.raises(LiveError, match="not the address of a server"):
        LiveServer(url, "key")


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, b"", "does not take this key"),
        (404, b"", "start the server with: diptych serve --admin"),
        (302, b"", "status 302"),
        (200, b"<html>", "no Diptych server"),
        (200, b'{"model": 3}', "no Diptych server"),
        (200, b'{"model": "m", "version": "1", "engines": []}', "no engine"),
    ],
)
def test_another_answer_than_a_servers_is_one_line_that_says_what_to_do(status: int, body: bytes, says: str) -> None:
    with answering(status, body) as url:
        server = LiveServer(url, "key")
        with pytest.raises(LiveError, match=says) as raised:
            server.about()
        server.close()
    assert "\n" not in str(raised.value)


def test_where_nothing_answers_the_server_is_gone() -> None:
    with answering(200, b"") as url:
        pass
    server = LiveServer(url, "key")
    with pytest.raises(ServerGone, match="nothing answers at"):
        server.events(-1)
    server.close()


def test_a_twins_step_times_are_the_servers_a_files_or_a_data_sheets(tmp_path: Path) -> None:
    (tmp_path / "calibrations").mkdir()
    calibration = {"format": "diptych-calibration-2", "provenance": {}}
    (tmp_path / "calibrations" / "h100.json").write_text(json.dumps(calibration))
    (tmp_path / "other.json").write_text("{}")
    assert list(costs.choices(tmp_path))[:3] == ["stated", "file:calibrations/h100.json", "sheet:h100-sxm"]
    engine = Engine({}, {}, dtype="bfloat16", model="meta/Llama-3.1-8B-Instruct", cost={"kind": "constant", "ns": 7})
    about = About("served", "1", [engine])
    assert costs.maker("stated", tmp_path)(about) == ConstantCost(7)
    sheet = costs.maker("sheet:h200", tmp_path)(about)
    assert isinstance(sheet, RooflineCost)
    assert (sheet.model.name, sheet.device.name) == ("llama-3.1-8b", "h200")
    unknown = About("served", "1", [Engine({}, {}, dtype="bfloat16", model="babel")])
    for choice, says in (
        ("stated", "states no cost model"),
        ("sheet:h200", "shape of 'babel' is not known"),
        ("file:calibrations/h100.json", "the cost model cannot be used"),
        ("file:../x.json", "there is no cost model"),
    ):
        with pytest.raises(LiveError, match=says):
            costs.maker(choice, tmp_path)(unknown)


def test_a_calibration_as_it_is_saved_is_offered_and_used(tmp_path: Path) -> None:
    EXACT.save(tmp_path / "saved.json")
    assert costs.choices(tmp_path)["file:saved.json"] == "calibration saved.json"
    about = About("served", "1", [Engine({}, {}, dtype="bfloat16", model="babel")])
    assert costs.maker("file:saved.json", tmp_path)(about).describe() == EXACT.describe()
