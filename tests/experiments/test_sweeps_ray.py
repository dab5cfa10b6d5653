"""A sweep on a Ray cluster of this machine: the same table as on its processes, and a cell that is lost has failed."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.sweeps import read_sweep, run_sweep
from tests.experiments.test_sweeps import BASE, PLUG_IN, contents

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the package ray is missing"),
    pytest.mark.skipif(
        "DIPTYCH_TEST_RAY" not in os.environ, reason="minutes of two cores: set DIPTYCH_TEST_RAY=1 to run it"
    ),
    pytest.mark.slow,
]
CLUSTER = """
import ray, sys
settings = dict(num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=10**8, _temp_dir=sys.argv[1])
context = ray.init("local", **settings)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster with two CPUs; its address. Its token is its own: Ray would leave one in the home folder."""
    # Not pytest's folders: the paths of sockets have to be short.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        command = [sys.executable, "-c", CLUSTER, folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                yield process.stdout.readline().strip()
            finally:
                process.communicate("")


def test_a_sweep_on_a_cluster_gives_the_table_of_one_on_this_machine(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("plug_in.py").write_text(PLUG_IN)
    queues = ["fcfs", "sjf", "plug_in:Mine", "plug_in:Mine,break_off=1"]
    grid = {"policies.queue": queues, "workload.rate": [20, 80]}
    sweep = read_sweep({"base": BASE, "variables": {"grid": grid, "seeds": 2}, "compare": "policies.queue"})
    path = tmp_path / "sweep.json"
    run_sweep(sweep, tmp_path / "here", processes=2)
    path.write_text(json.dumps(sweep.content))
    command = [sys.executable, "-c", "from experiments.cli import main; main()", "sweep", str(path), "-o", "there"]
    done = subprocess.run([*command, "--ray", cluster], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "failed: RuntimeError: not today" in done.stderr
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
