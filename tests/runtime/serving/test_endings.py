"""How the server ends: its engine killed, stopped by an error, not started; Ctrl-C. Every request gets an end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runtime.serving.disconnecting import Client
from tests.runtime.serving.running import PATIENCE, Running, running, wait_until

FOREVER = {"prompt": [5] * 10, "max_tokens": 1900, "ignore_eos": True}

FAULTY = '''
from policies.schedulers.mixed import Mixed


class Faulty(Mixed):
    """Breaks when it meets a request of priority 13."""

    def plan(self, view, now):
        if any(request.priority == 13 for request in view.running.values()):
            raise ArithmeticError("thirteen")
        return super().plan(view, now)
'''


def _open(server: Running) -> tuple[Client, Client, Client]:
    """One that streams, one that waits for its whole answer, one that is queued behind them."""
    streaming, whole = Client(server, {**FOREVER, "stream": True}), Client(server, FOREVER)
    assert b"200 OK" in streaming.read_some()
    wait_until(lambda: server.info()["engines"][0]["running"] == 2, "two run")
    queued = Client(server, FOREVER)
    wait_until(lambda: server.info()["live"] == 3, "the third waits")
    return streaming, whole, queued


def test_when_the_engine_is_killed_everybody_is_told_at_once(model_folder: Path) -> None:
    with running(model_folder, max_num_seqs=2, num_blocks=512, max_model_len=2048) as server:
        streaming, whole, queued = _open(server)
        server.engine().kill()
        killed = time.monotonic()
        for client in (whole, queued):
            answer = client.everything()
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"the engine process was killed by signal 9" in answer
        rest = streaming.everything()
        assert b'data: {"error":{"message":"the engine process was killed by signal 9"' in rest
        assert rest.rstrip(b"\r\n0").endswith(b"data: [DONE]")
        assert time.monotonic() - killed < 2
        assert server.http.get("/health").status_code == 503
        refused = server.http.post("/v1/completions", json=FOREVER)
        assert refused.status_code == 503
        assert "killed by signal 9" in refused.json()["error"]["message"]
        assert server.http.get("/metrics").status_code == 200
        assert server.http.post("/admin/pause", headers={"Authorization": "Bearer operators-only"}).status_code == 503


def test_when_a_policy_breaks_everybody_is_told_why(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY, encoding="utf-8")
    with running(
        model_folder, "--scheduler", "faulty:Faulty", path=tmp_path, num_blocks=512, max_model_len=2048
    ) as server:
        streaming = Client(server, {**FOREVER, "stream": True})
        assert b"200 OK" in streaming.read_some()
        answer = server.http.post("/v1/completions", json={**FOREVER, "priority": 13})
        assert answer.status_code in (500, 503)
        assert "ArithmeticError: thirteen" in answer.text
        assert b"ArithmeticError: thirteen" in streaming.everything()
        wait_until(lambda: server.http.get("/health").status_code == 503, "the server says so")


FAULTY_ONCE = """
from pathlib import Path

from policies.schedulers.mixed import Mixed

ARMED = Path(__file__).with_name("armed")


class FaultyOnce(Mixed):
    def plan(self, view, now):
        if any(request.priority == 13 for request in view.running.values()) and ARMED.exists():
            ARMED.unlink()
            raise ArithmeticError("thirteen")
        return super().plan(view, now)
"""


def test_when_a_replica_stops_on_an_error_what_was_not_begun_goes_elsewhere(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "faulty_once.py").write_text(FAULTY_ONCE, encoding="utf-8")
    (tmp_path / "armed").touch()
    with running(
        model_folder, "--scheduler", "faulty_once:FaultyOnce", "--replicas", "2", path=tmp_path,
        num_blocks=512, max_num_seqs=2, max_model_len=2048,
    ) as server:  # fmt: skip
        begun = [Client(server, {**FOREVER, "max_tokens": 600, "stream": True}) for _ in range(2)]
        assert all(b"200 OK" in client.read_some() for client in begun)
        waiting = [Client(server, {**FOREVER, "max_tokens": 5, "priority": 13 if i == 0 else 0}) for i in range(8)]
        assert [client.status() for client in waiting] == [200] * 8
        rests = [client.everything() for client in begun]
        assert sum(b"ArithmeticError: thirteen" in rest for rest in rests) == 1
        assert sorted(engine["state"] for engine in server.info()["engines"]) == ["dead", "serving"]
        assert server.info()["live"] == 0


def test_a_signal_to_the_whole_group_ends_the_server_as_one_to_the_front_does(model_folder: Path) -> None:
    with running(model_folder, "--drain", "30", num_blocks=512, max_model_len=2048) as server:
        short = Client(server, {"prompt": "Hello", "max_tokens": 100, "ignore_eos": True})
        wait_until(lambda: server.info()["live"] == 1, "it is there")
        server.engine().send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)
        assert short.status() == 200
        assert server.process.wait(PATIENCE) == 0


def test_ctrl_c_lets_requests_end_and_then_ends_them(model_folder: Path) -> None:
    with running(model_folder, "--drain", "1", max_num_seqs=2, num_blocks=512, max_model_len=2048) as server:
        short = Client(server, {"prompt": "Hello", "max_tokens": 40, "ignore_eos": True})
        streaming = Client(server, {**FOREVER, "max_tokens": 2000, "stream": True})
        assert b"200 OK" in streaming.read_some()
        server.process.send_signal(signal.SIGINT)
        assert short.status() == 200
        rest = streaming.everything()
        assert b"the server is shutting down" in rest or b'"finish_reason":"length"' in rest
        assert rest.rstrip(b"\r\n0").endswith(b"data: [DONE]")
        assert server.process.wait(PATIENCE) == 0


def test_when_the_front_is_killed_the_engine_ends_by_itself(model_folder: Path) -> None:
    with running(model_folder, num_blocks=512, max_model_len=2048) as server:
        engine = server.engine()
        client = Client(server, {**FOREVER, "stream": True})
        assert client.read_some()
        server.process.kill()
        server.process.wait(PATIENCE)
        engine.wait(PATIENCE)


def test_an_engine_that_does_not_start_says_why_in_one_line(model_folder: Path) -> None:
    with pytest.raises(AssertionError) as caught, running(model_folder, num_blocks=2**24):
        pass
    assert re.search(
        r"diptych: a KV cache of 16777216 blocks needs .* GiB, .*; lower limits.num_blocks", str(caught.value)
    )


def test_help_shows_an_example() -> None:
    code = "from experiments.cli import main; main()"
    shown = subprocess.run([sys.executable, "-c", code, "serve", "--help"], capture_output=True, text=True, check=True)
    assert "Example: diptych serve" in shown.stdout
