"""What a run ran on: the part of run.json that nobody types."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from policies import control_plane

KINDS = ("real", "sim", "replay", "client")
"""Who wrote a run: the runtime, the simulator, the simulator with a real run's arrivals and step times, or a client of
a server, which sees requests and no steps."""


REVISION = "REVISION"
"""A file beside the packages that says which revision they are, where they are a compiled copy of a checkout."""


def run_info(
    kind: str,
    *,
    spec: Mapping[str, Any],
    limits: Mapping[str, Any],
    stack: Mapping[str, str],
    clairvoyant: bool,
    workload: Mapping[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """The content of run.json.

    Args:
        kind: `real`, `sim`, `replay` or `client`.
        spec: the specification that gives this run again.
        limits: `policies.replica_state.Limits` as a dict.
        stack: role -> policy, as `StackSpec.as_dict` has it.
        clairvoyant: a policy is told what a real system cannot know; its results are labelled.
        workload: where the requests come from.
        more: further entries, JSON values.
    """
    return {
        **describe_environment(kind),
        "spec": dict(spec),
        "limits": dict(limits),
        "stack": dict(stack),
        "clairvoyant": clairvoyant,
        "workload": dict(workload),
        **more,
    }


def describe_environment(kind: str) -> dict[str, Any]:
    """Versions, git revision and, for a run in real time, the hardware and the date (of a client its own machine's).

    A simulated run's entry has nothing of the host in it, so that the same seed gives the same bytes.
    Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    packages = ["numpy", "pyarrow", "torch"] if kind == "real" else ["numpy", "pyarrow"]
    described: dict[str, Any] = {
        "diptych": _version("diptych"),
        "kind": kind,
        "git": git_revision(),
        "software": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "compiled": is_compiled(),
        "hardware": {},
    }
    if kind in ("real", "client"):
        described["hardware"] = _host() | (_gpus() if kind == "real" else {})
        described["started_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    return described


def is_compiled() -> bool:
    """Whether this is code that `experiments.compiling` has compiled."""
    return not str(control_plane.__file__).endswith(".py")


@functools.cache
def git_revision() -> str | None:
    """The commit this code was checked out from, with `-dirty` where files were changed; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if (root / REVISION).exists():
        return (root / REVISION).read_text(encoding="utf-8") or None
    if not (root / ".git").exists():  # installed somewhere inside another repository: that one's commit says nothing
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def version_line() -> str:
    """What a report of an error begins with: version, revision, Python, PyTorch, and the device there is to run on."""
    gpus = ", ".join(gpu["name"] for gpu in _gpus()["gpus"])
    compiled = ", compiled" if is_compiled() else ""
    return (
        f"diptych {_version('diptych') or 'not installed'}, revision {git_revision() or 'unknown'}, "
        f"Python {platform.python_version()}{compiled}, torch {_version('torch') or 'not installed'}, "
        f"device {gpus or 'cpu: ' + _cpu_model()}"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _host() -> dict[str, Any]:
    return {"platform": platform.platform(), "cpu": _cpu_model(), "cores": usable_cores()}


def usable_cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> dict[str, Any]:
    hardware: dict[str, Any] = {"gpus": []}
    try:
        import torch
    except ImportError:
        return hardware
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpu = {"name": properties.name, "memory_bytes": properties.total_memory}
            hardware["gpus"].append(gpu | {"card": card_of(str(getattr(properties, "uuid", "")))})
        hardware["cuda"] = torch.version.cuda
    return hardware


def card_of(uuid: str) -> str:
    """Tells the record of one card from that of another of its kind, without saying which card it was."""
    return hashlib.sha256(uuid.encode()).hexdigest()[:8]


def _cpu_model() -> str:
    if sys.platform == "linux":
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()


_GPU_STATE = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit")


def gpu_state() -> list[dict[str, str]]:
    """What each GPU's driver says of it now: clocks in MHz, temperature in degrees Celsius, power in watts. Empty where
    there is no GPU, or no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU_STATE)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.strip()]
    return [dict(zip(_GPU_STATE, row, strict=True)) for row in rows if len(row) == len(_GPU_STATE)]
