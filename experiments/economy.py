"""What a simulated run's replicas take: how long they are up, and estimates of energy and money.

Energy is `simulator.devices.Device.energy_j` of each device: from its data sheet and the time that it is busy, without
hosts, cooling and losses. Money is the specification's `price_per_hour` of a device, for as long as a replica is up:
from when it is asked for until it stops. Both are estimates, and their names say so.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from experiments.records import Run
from simulator.devices import Device, DeviceError, device_like

HOUR_S = 3600.0


def economy(run: Run, output_tokens: int) -> dict[str, float | None]:
    """Figures of a simulated run; `output_tokens`: those that it was for. None where nothing is known.

    `replica_seconds`: of all replicas together, from being asked for, or the start, until they stopped, or the end.
    `busy_share`: of that, the device was busy. `estimated_joule_per_output_token` where devices are known, and
    `estimated_price_per_million_output_tokens` where a price is.
    """
    if run.kind != "sim":
        return {}
    up, busy = replica_seconds(run), _busy_seconds(run)
    total = sum(up.values())
    energy = [_energy_j(_cost_of(run, i), seconds, busy.get(i, 0.0)) for i, seconds in up.items()]
    money = [_money(run, i, seconds) for i, seconds in up.items()]
    known_j, known_money = [j for j in energy if j is not None], [m for m in money if m is not None]
    return {
        "replica_seconds": total,
        "busy_share": sum(busy.values()) / total if total else None,
        "estimated_joule_per_output_token": sum(known_j) / output_tokens
        if output_tokens and len(known_j) == len(energy)
        else None,
        "estimated_price_per_million_output_tokens": 1e6 * sum(known_money) / output_tokens
        if output_tokens and len(known_money) == len(money)
        else None,
    }


def replica_seconds(run: Run) -> dict[int, float]:
    """How long each replica was up, in seconds by its number."""
    end = _end_ns(run)
    if "replicas" not in run.info["tables"]:
        return dict.fromkeys(range(int(run.spec.get("replicas") or 1)), end / 1e9)
    begin: dict[int, int] = {}
    until: dict[int, int] = {}
    for event in run.table("replicas").to_pylist():
        begin.setdefault(event["replica"], event["time_ns"])
        if event["event"] in ("stop", "fail"):
            until[event["replica"]] = event["time_ns"]
    return {i: max(0, min(end, until.get(i, end)) - at) / 1e9 for i, at in begin.items()}


def _end_ns(run: Run) -> int:
    """When the last step or request ended."""
    ends = [
        pc.max(run.columns("steps", ["end_ns"])["end_ns"]).as_py(),
        pc.max(run.columns("requests", ["finish_ns"])["finish_ns"]).as_py(),
    ]
    return max((end for end in ends if end is not None), default=0)


def _busy_seconds(run: Run) -> dict[int, float]:
    steps: pa.Table = run.columns("steps", ["replica", "device_ns"])
    sums = steps.group_by("replica").aggregate([("device_ns", "sum")])
    return {row["replica"]: row["device_ns_sum"] / 1e9 for row in sums.to_pylist()}


def _cost_of(run: Run, replica: int) -> dict[str, Any]:
    pool = run.pool_of(replica)
    return dict((run.info if pool is None else pool).get("cost") or {})


def _energy_j(cost: dict[str, Any], up_s: float, busy_s: float) -> float | None:
    device = _device(cost)
    energy = None if device is None else device.energy_j(up_s, busy_s)
    return None if energy is None else energy * num_devices(cost)


def _money(run: Run, replica: int, up_s: float) -> float | None:
    pool = run.pool_of(replica)
    price = (run.spec if pool is None else pool).get("price_per_hour")
    return None if price is None else price * up_s / HOUR_S * num_devices(_cost_of(run, replica))


def num_devices(cost: dict[str, Any]) -> int:
    """That a replica is made of, by the description of its cost model."""
    return int(cost.get("tensor_parallel") or (cost.get("provenance") or {}).get("tensor_parallel") or 1)


def _device(cost: dict[str, Any]) -> Device | None:
    """The data sheet behind a cost model's description."""
    if cost.get("kind") == "roofline":
        try:
            return Device.from_dict(cost["device"])
        except (DeviceError, KeyError, TypeError):
            return None
    gpus = ((cost.get("provenance") or {}).get("hardware") or {}).get("gpus") or []
    return device_like(str(gpus[0].get("name", ""))) if gpus else None
