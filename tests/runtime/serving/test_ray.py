"""Replicas on a Ray cluster, a real one on this machine: placed, lost, restarted, and nothing is left of them."""

from __future__ import annotations

import importlib.util
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.records import read_run
from experiments.replicas import Places
from runtime.serving import ray_link
from tests.runtime.serving.attaching import LIMITS
from tests.runtime.serving.disconnecting import Client
from tests.runtime.serving.running import diptych, environment, nothing_left, running, wait_until

PATIENCE = 400.0  # Ray starts slowly on a busy machine
LONG = {"prompt": [5] * 20, "max_tokens": 400, "ignore_eos": True}
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the package ray is missing")
takes_long = pytest.mark.skipif(
    "DIPTYCH_TEST_RAY" not in os.environ, reason="minutes of two cores: set DIPTYCH_TEST_RAY=1 to run it"
)

CLUSTER = """
import ray, sys
settings = dict(num_cpus=3, num_gpus=0, include_dashboard=False, object_store_memory=10**8, _temp_dir=sys.argv[1])
context = ray.init("local", **settings)  # not one that runs here already
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
ray.shutdown()
"""

WITHOUT_ROOM = """
import asyncio, sys
from runtime.serving import ray_link

async def main():
    link = ray_link.RayLink(print, 10.0, num_gpus=1)
    try:
        await link.open(print, print)
    finally:
        await link.close(None)

ray_link.PATIENCE_SECONDS, ray_link.PLACE_SECONDS = 0.1, 2.0
ray_link.connect(sys.argv[1])
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster with three CPUs; its address. Its token is its own: Ray would leave one in the home folder."""
    # Not pytest's folders: the paths of sockets have to be short.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        with subprocess.Popen(
            [sys.executable, "-c", CLUSTER, folder],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            try:
                yield process.stdout.readline().strip()
            finally:
                process.communicate("")


@needs_ray
@takes_long
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_replicas_on_a_cluster_serve_die_and_are_restarted_like_any(
    model_folder: Path, cluster: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    flags = ("--ray", cluster, "--replicas", "2", "--router", "round_robin", "-o", str(folder))
    with running(model_folder, *flags, patience=PATIENCE, **LIMITS) as server:
        pids = [server.engine(number).pid for number in (0, 1)]
        bodies = [{**LONG, "max_tokens": 30, "seed": i} for i in range(4)]
        texts = [client.json()["choices"][0]["text"] for client in [Client(server, body) for body in bodies]]
        assert all(engine["steps"]["count"] > 20 for engine in server.info()["engines"])

        begun = [Client(server, {**LONG, "stream": True}) for _ in range(8)]
        for client in begun:
            assert b"200 OK" in client.read_some()
        waiting = [Client(server, {**LONG, "max_tokens": 5}) for _ in range(8)]
        wait_until(lambda: server.info()["queued"] >= 6, "both replicas have requests that wait")
        server.engine(1).parent().kill()  # the actor, as when its node is lost
        assert [client.status() for client in waiting] == [200] * 8
        assert sum(b"is lost" in client.everything() for client in begun) == 4
        assert [engine["state"] for engine in server.info()["engines"]] == ["serving", "dead"]
        nothing_left([pids[1]])

        server.http.timeout = PATIENCE
        assert server.operate("/admin/replicas/1/restart") == {"replica": 1}
        pids.append(server.engine(1).pid)
        server.operate("/admin/replicas/0/drain")
        again = [server.http.post("/v1/completions", json=body).json()["choices"][0]["text"] for body in bodies]
        assert again == texts
    nothing_left(pids)
    records = {path.name: read_run(path) for path in folder.iterdir()}
    assert sorted(records) == ["replica-0", "replica-1", "replica-1.2"]
    assert all(records[name].complete for name in ("replica-0", "replica-1.2"))


@needs_ray
@pytest.mark.slow
def test_a_cluster_that_takes_no_front_ends_the_command_in_a_line(model_folder: Path) -> None:
    def said(*flags: str) -> str:
        command = diptych("serve", "--model", str(model_folder), "--port", "0", *flags)
        ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert ended.returncode != 0
        return ended.stderr

    refused = said("--ray", "127.0.0.1:1").splitlines()
    assert len(refused) == 1
    assert "no Ray cluster takes this front at 127.0.0.1:1 (" in refused[0]
    assert "token, set RAY_AUTH_MODE=token here too" in refused[0]


@needs_ray
@pytest.mark.slow
def test_an_engine_without_room_on_the_cluster_is_given_up(cluster: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_ROOM, cluster], env=environment(), capture_output=True, text=True, check=False
    )
    assert "EngineStartError: the Ray cluster has had no GPU free for 2 s" in ended.stderr


def test_a_wrong_address_and_a_missing_package_are_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("10.0.0.7", "ray://10.0.0.7:6379", "10.0.0.7:port"):
        with pytest.raises(ValueError, match="write auto for the one"):
            Places(ray=address)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'diptych\[ray\]'"):
        ray_link.connect("auto")
