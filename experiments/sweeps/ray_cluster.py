"""Cells on a Ray cluster, each into a folder on the node that runs it; what is in the folder comes back to the sweep's.

Nodes need this project in the version of whoever starts the sweep (a cell says so if not), and the files that a
specification names under the same paths. No folder has to be shared.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import tarfile
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.spec import RunSpec
from experiments.sweeps.cell_run import Job, perform, settled
from experiments.sweeps.local import CELLS_PER_PROCESS
from experiments.sweeps.running import Runner
from runtime.serving.ray_link import connect

AHEAD = 2
"""Cells asked for at once, per CPU of the cluster: none waits for the next one, and few results wait to be stored."""


def connected(address: str) -> Runner:
    """Join a cluster; what runs cells on it. Raises ValueError, ConnectionError."""
    connect(address)
    return run_on_ray


def run_on_ray(jobs: Sequence[Job], cells: Path) -> Iterator[tuple[Job, dict[str, Any]]]:
    """As `local.LocalRunner`, on the cluster that this process has joined. A node that is lost loses its cells: they
    have failed. A real run has the GPUs that it needs to itself, or without any one CPU."""
    ray: Any = importlib.import_module("ray")
    function = ray.remote(max_calls=CELLS_PER_PROCESS, max_retries=0)(_perform)
    waiting = deque(jobs)
    running: dict[Any, Job] = {}
    ahead = max(1, AHEAD * int(ray.cluster_resources().get("CPU", 1)))
    try:
        while waiting or running:
            while waiting and len(running) < ahead:
                job = waiting.popleft()
                running[function.options(**_needs(job)).remote(job, os.getcwd())] = job
            done, _ = ray.wait(list(running), num_returns=1)
            job = running.pop(done[0])
            try:
                note, packed = ray.get(done[0])
            except ray.exceptions.RayError as error:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                yield job, {"status": "failed", "error": f"its worker was lost: {(lines or [type(error).__name__])[0]}"}
                continue
            with settled(cells / job.name) as scratch:
                scratch.mkdir()
                with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                    archive.extractall(scratch, filter="data")
            yield job, note
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _needs(job: Job) -> dict[str, Any]:
    model = RunSpec.model_validate(job.spec).model
    gpus = model.tensor_parallel if job.panel == "real" and model.device.startswith("cuda") else 0
    return {"num_cpus": 1, "num_gpus": gpus}


def _perform(job: Job, directory: str) -> tuple[dict[str, Any], bytes]:
    """On a node: the cell's note, and its folder as an archive."""
    if os.path.isdir(directory):
        os.chdir(directory)  # relative paths mean what they do where the sweep was started
    if "" not in sys.path:
        sys.path.insert(0, "")  # policies of the user's, as the command line finds them
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / job.name
        note = perform(job, folder)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, path.name)
        return note, packed.getvalue()
