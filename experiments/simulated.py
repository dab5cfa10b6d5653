"""Running a specification in the simulated panel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from experiments.clients import Patience
from experiments.coming import arrivals_of, keys_of
from experiments.records import RunWriter, read_run, run_info
from experiments.spec import CostSpec, RunSpec, SpecError
from experiments.timeline import check_books
from experiments.workloads import Workload, make_workload
from policies import registry
from policies.contract import Router
from policies.model_shape import ModelShape
from policies.registry import PolicySpec
from policies.replica_state import Limits
from policies.request import Request
from simulator.cluster import Cluster, Pool
from simulator.costs.base import CostModel, predicted
from simulator.costs.calibration import Calibration
from simulator.costs.constant import ConstantCost
from simulator.costs.drawn import DrawnCost
from simulator.costs.earlier import upgraded
from simulator.costs.fitted import FittedCost
from simulator.costs.roofline import HostTimes, RooflineCost
from simulator.devices import Device, load_device
from simulator.links import LinkSpeed
from simulator.simulation import Simulation

GIB = 2**30
LIMITS = (
    "num_blocks",
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "prefix_caching",
    "lag",
)
"""The fields of `Limits` that a specification gives under the same names."""
MEMORY_SHARE = 0.9
"""Of a simulated device's memory, for weights and KV cache; the rest is for activations."""
SIMULATED_MODEL_LEN = 32_768
"""Longest sequence of a simulated model where nobody says: a long context, as today's models have."""


def run_simulated(
    spec: RunSpec,
    folder: Path,
    *,
    workload: Workload | None = None,
    costs: CostModel | None = None,
    limits: Limits | None = None,
    overwrite: bool = False,
    check: bool = False,
    on_end: Callable[[Request], None] | None = None,
    flush_seconds: float = 5.0,
) -> int:
    """Simulate a specification and write its run folder. Returns the simulated nanoseconds.

    `workload`, `costs` and `limits` may be given where they are at hand already; they must be what `spec` describes.
    Interrupted, it leaves a readable, incomplete record; while it runs, one that is `flush_seconds` old at most.
    `check`: invariants after every step, Little's law at the end.
    """
    workload = workload or make_workload(spec.workload)
    patience = patience_of(spec)
    oracle = oracle_of(workload, patience)
    pools = make_pools(spec, workload, oracle, costs, limits)
    limits = pools[0].limits
    stack = pools[0].stack()
    clairvoyant = any(pool.stack().clairvoyant for pool in pools)
    router, _ = make_router(spec, pools[0].costs, limits)
    changes = bool(spec.pools) or any(pool.autoscaler.every_ns for pool in pools if pool.autoscaler is not None)
    info = run_info(
        "sim",
        spec=spec.model_dump(mode="json"),
        limits=asdict(limits),
        stack=spec.policies.stack.as_dict(),
        clairvoyant=clairvoyant,
        **oracle_entry(oracle, clairvoyant),
        **clients_entry(workload, patience),
        workload=workload.provenance,
        cost=pools[0].costs.describe(),
        **({"pools": [_pool_entry(spec, i, pool) for i, pool in enumerate(pools)]} if changes else {}),
    )
    with RunWriter(
        folder, info, overwrite=overwrite, decisions=spec.decisions, replicas=changes, flush_seconds=flush_seconds
    ) as writer:
        caching = any(pool.limits.prefix_caching for pool in pools)
        coming = arrivals_of(workload, replace(limits, prefix_caching=caching), patience)
        options: dict[str, Any] = {
            "recorder": writer,
            "on_end": on_end,
            "followers": coming.followers,
            "gives_up": coming.gives_up,
            "check": check,
        }
        simulation: Simulation
        if changes:
            simulation = Cluster(pools, router, on_change=writer.replica_changed, **options)
        else:
            routing = router if spec.replicas > 1 else None  # the real panel, which has one, routes nothing either
            stacks = [stack, *(pools[0].stack() for _ in range(1, spec.replicas))]
            simulation = Simulation(limits, stacks, pools[0].costs, routing, link=pools[0].link, **options)
        simulated_ns = simulation.run(coming.arrivals)
    if check:
        check_books(read_run(folder))
    return simulated_ns


def router_class(spec: RunSpec) -> type:
    """The class of a specification's router."""
    return registry.find("router", PolicySpec.parse(spec.policies.router).name)


def make_router(spec: RunSpec, costs: CostModel, limits: Limits) -> tuple[Router, LinkSpeed | None]:
    """A specification's router, and the speed of the links where it moves KV. Raises PolicyError, SpecError.

    `costs` and `limits` are those of the first pool; where others differ, a router sees it of each replica.
    """
    link = link_of(spec, costs, limits) if registry.moves_kv(router_class(spec)) else None
    context = {"seed": spec.seed, "block_size": limits.block_size, "cost": predicted(costs), "transfer": link}
    return registry.make("router", spec.policies.router, **context), link


def make_pools(
    spec: RunSpec,
    workload: Workload,
    oracle: Mapping[int, int],
    costs: CostModel | None = None,
    limits: Limits | None = None,
) -> list[Pool]:
    """The replicas of a specification: of one pool without a name where it has none. Raises PolicyError, SpecError.

    `costs` and `limits`, where they are at hand, are those of such a pool.
    """
    if not spec.pools:
        return [_pool(spec, workload, oracle, costs, limits)]
    pools = [
        replace(_pool(spec.of_pool(i), workload, oracle), name=pool.name, role=pool.role)
        for i, pool in enumerate(spec.pools)
    ]
    for name in ("block_size", "lag"):
        if len({getattr(pool.limits, name) for pool in pools}) > 1:
            raise SpecError(f"limits.{name}: it must be the same in all pools")
    shapes = [getattr(pool.costs, "model", None) for pool in pools if pool.link is not None]
    if len({getattr(shape, "kv_bytes_per_token", 0) for shape in shapes}) > 1:
        raise SpecError("KV moves only between pools of one model: their blocks have different sizes")
    return pools


def _pool(
    spec: RunSpec,
    workload: Workload,
    oracle: Mapping[int, int],
    costs: CostModel | None = None,
    limits: Limits | None = None,
) -> Pool:
    """The replicas of a specification that has no pools."""
    costs = costs or make_costs(spec.cost or CostSpec())
    limits = limits or simulated_limits(spec, costs)
    context: dict[str, Any] = {"block_size": limits.block_size, "seed": spec.seed, "oracle": oracle}
    stack = partial(spec.policies.stack.build, **context, future=_future(spec, workload, limits))
    scaler = registry.make("autoscaler", spec.policies.autoscaler, seed=spec.seed)
    return Pool(
        limits,
        costs,
        stack,
        spec.replicas,
        link=link_of(spec, costs, limits) if registry.moves_kv(router_class(spec)) else None,
        autoscaler=scaler,
        cold_start_ns=_cold_start_ns(spec, costs) if scaler.every_ns else 0,
    )


def _cold_start_ns(spec: RunSpec, costs: CostModel) -> int:
    """As given; else as long as it takes to read the weights, each device its part, over the host's link."""
    if spec.cold_start_s is not None:
        return round(1e9 * spec.cold_start_s)
    if not isinstance(costs, RooflineCost):
        raise SpecError(
            "cold_start_s: say how long a replica takes to start; only a roofline knows what it has to load"
        )
    return round(1e9 * costs.model.weight_bytes / costs.tensor_parallel / costs.device.reached_host_link)


def _pool_entry(spec: RunSpec, index: int, pool: Pool) -> dict[str, object]:
    """What run.json says of a pool."""
    own = spec.of_pool(index) if spec.pools else spec
    return {
        "name": pool.name,
        "role": pool.role,
        "replicas": pool.num_replicas,
        "limits": asdict(pool.limits),
        "stack": own.policies.stack.as_dict(),
        "autoscaler": own.policies.autoscaler,
        "cold_start_ns": pool.cold_start_ns,
        "price_per_hour": own.price_per_hour,
        "cost": pool.costs.describe(),
    }


def link_of(spec: RunSpec, costs: CostModel, limits: Limits) -> LinkSpeed:
    """How fast KV moves between the replicas. Raises SpecError where nobody knows."""
    model, device = getattr(costs, "model", None), getattr(costs, "device", None)
    if not isinstance(model, ModelShape) or not isinstance(device, Device):
        raise SpecError(
            f"router {spec.policies.router} moves KV cache, and only a roofline (--model, --device) knows its bytes"
        )
    bandwidth = spec.link.bandwidth or device.reached_peer_link
    # Devices that share a model send their parts side by side.
    block_bytes = math.ceil(model.kv_bytes_per_token * limits.block_size / getattr(costs, "tensor_parallel", 1))
    return LinkSpeed(bandwidth, block_bytes, round(1e3 * spec.link.latency_us))


def _future(spec: RunSpec, workload: Workload, limits: Limits) -> dict[int, list[bytes]] | None:
    """The block keys of all requests, in order of arrival, where a policy asks for them."""
    if not spec.policies.stack.wants_future:
        return None
    if spec.num_replicas > 1 or spec.pools or spec.policies.autoscaler != "fixed":
        raise SpecError(
            "a policy that is told the block keys to come needs one replica: a router decides who gets what"
        )
    if workload.parents is not None or spec.workload.timeout_s is not None:
        raise SpecError(
            "a policy that is told the block keys to come needs arrivals that are known: no closed loop, no timeout_s"
        )
    return dict(enumerate(keys_of(workload, limits)))


def patience_of(spec: RunSpec) -> Patience:
    """What a specification's clients bear."""
    seconds = spec.workload.timeout_s
    return Patience(None if seconds is None else round(1e9 * seconds), spec.workload.retries)


def oracle_of(workload: Workload, patience: Patience) -> dict[int, int]:
    """The true output length of every request by id, of all tries."""
    return dict(enumerate((1 + patience.retries) * workload.output_tokens.tolist()))


def clients_entry(workload: Workload, patience: Patience) -> dict[str, dict[str, int]]:
    """For run.json: what tells tries apart, where clients try again."""
    return {} if patience.timeout_ns is None else {"clients": {"requests": len(workload), **asdict(patience)}}


def oracle_entry(oracle: dict[int, int], clairvoyant: bool) -> dict[str, list[int]]:
    """For run.json: the true lengths, by request id, where a policy was told them; a replay tells them again."""
    return {"oracle": list(oracle.values())} if clairvoyant else {}


def make_costs(spec: CostSpec) -> CostModel:
    """The cost model of a specification."""
    if spec.kind == "fitted":
        assert spec.calibration is not None
        fitted = FittedCost.load(Path(spec.calibration))
        return fitted if spec.residuals is None else DrawnCost(fitted, spec.residuals)
    if spec.kind == "constant":
        assert spec.step_ms is not None
        return ConstantCost(round(spec.step_ms * 1e6), spec.swap_ns_per_token or 0)
    shape = ModelShape.preset(spec.model).in_dtype(spec.dtype)
    return RooflineCost(shape, load_device(spec.device), tensor_parallel=spec.tensor_parallel)


def costs_as_described(description: dict[str, Any]) -> CostModel:
    """The cost model that a run's record describes: what `CostModel.describe` gave. Raises SpecError."""
    fields = {name: value for name, value in description.items() if name != "kind"}
    try:
        match description.get("kind"):
            case "fitted":
                seed = fields.pop("residuals", None)
                fitted = FittedCost(Calibration.model_validate(upgraded(fields)))
                return fitted if seed is None else DrawnCost(fitted, seed)
            case "constant":
                return ConstantCost(**fields)
            case "roofline":
                model, device = ModelShape.from_dict(fields.pop("model")), Device.from_dict(fields.pop("device"))
                shared, dtype = fields.pop("tensor_parallel", 1), fields.pop("dtype")
                return RooflineCost(model, device, HostTimes(**fields), dtype, shared)
    except (KeyError, TypeError, ValueError) as error:
        raise SpecError(f"the recorded cost model cannot be used: {error}") from error
    raise SpecError(f"the recorded cost model cannot be used: there is no kind {description.get('kind')!r}")


def simulated_limits(spec: RunSpec, costs: CostModel) -> Limits:
    """The limits of a simulated replica: as given, else as the calibration, or the device's memory, has them."""
    costs = predicted(costs)
    given, measured = spec.limits, _measured_limits(costs)
    fields = {name: getattr(given, name) for name in LIMITS}
    if measured is not None:
        fields |= {name: getattr(measured, name) for name in LIMITS if name not in given.model_fields_set}
        if given.num_blocks is None and given.kv_cache_gib is None:
            if fields["block_size"] != measured.block_size:
                raise SpecError(
                    "limits.num_blocks: with another block size than the calibration's, say how many blocks"
                )
            fields["num_blocks"] = measured.num_blocks
    if fields["max_model_len"] is None:
        fields["max_model_len"] = SIMULATED_MODEL_LEN
    if fields["num_blocks"] is None:
        fields["num_blocks"] = _blocks_that_fit(spec, costs)
    fields["num_host_blocks"] = _host_blocks(spec, costs, measured)
    fields |= _disk(spec, costs, measured)
    check_disk(fields["num_disk_blocks"], fields["num_host_blocks"], fields["prefix_caching"])
    for name, otherwise in (("capture_sizes", ()), ("mixed_capture_sizes", ()), ("plan_lead_ns", None)):
        fields[name] = getattr(given, name)
        if fields[name] is None:
            fields[name] = getattr(measured, name) if measured is not None else otherwise
    limits = Limits(**fields)
    check_swaps(limits, costs)
    check_offload(spec, limits)
    return limits


def check_offload(spec: RunSpec, limits: Limits) -> None:
    """Raises SpecError where prefixes are to be kept in host memory and there is none, or no prefixes are kept; or on
    disk, where nothing gets."""
    offload = spec.policies.offload
    if offload != "never" and not limits.prefix_caching:
        raise SpecError(f"policies.offload: {offload} keeps prefixes, and limits.prefix_caching is off; leave out one")
    if offload == "never" and (spec.limits.num_disk_blocks or spec.limits.disk_gib):
        raise SpecError("limits: on disk lies what an offload policy keeps; name one, as --offload write_back")
    if offload != "never" and not limits.num_host_blocks:
        raise SpecError(f"policies.offload: {offload} keeps prefixes in host memory; give some with --host-memory GIB")


def check_disk(num_disk_blocks: int, num_host_blocks: int, prefix_caching: bool) -> None:
    """Raises SpecError where there is a disk tier and what it stands behind is missing."""
    if num_disk_blocks and not prefix_caching:
        raise SpecError("limits.num_disk_blocks: on disk lie prefixes, and limits.prefix_caching is off; leave out one")
    if num_disk_blocks and not num_host_blocks:
        raise SpecError("limits.num_disk_blocks: blocks get to disk by host memory; give some with --host-memory GIB")


def _disk(spec: RunSpec, costs: CostModel, measured: Limits | None) -> dict[str, int]:
    """The fields of `Limits` about the disk: as given, else as the calibration's runtime had them, or the device."""
    given, blocks = spec.limits, spec.limits.num_disk_blocks
    block_bytes = costs.model.kv_bytes_per_token * given.block_size if isinstance(costs, RooflineCost) else None
    if blocks is None and given.disk_gib is not None:
        if block_bytes is None:
            raise SpecError("limits.disk_gib: give limits.num_disk_blocks; only a roofline knows a block's bytes")
        blocks = int(given.disk_gib * GIB // block_bytes)
    if blocks is None:
        blocks = 0 if measured is None else measured.num_disk_blocks
    if not blocks:
        return {"num_disk_blocks": 0}
    if given.disk_block_us is not None:
        times = [round(1e3 * given.disk_block_us)] * 2
    elif block_bytes is not None and isinstance(costs, RooflineCost):
        device, both = costs.device, given.disk_gb_s
        rates = (device.disk_read_bandwidth, device.disk_write_bandwidth) if both is None else (1e9 * both, 1e9 * both)
        times = [round(1e9 * block_bytes / rate) for rate in rates]
    elif given.disk_gb_s is None and measured is not None and measured.disk_read_ns:
        times = [measured.disk_read_ns, measured.disk_write_ns]
    else:
        raise SpecError(
            "limits.num_disk_blocks: how long a block takes on disk is not known; give limits.disk_block_us, or "
            "profile with --disk"
        )
    return {"num_disk_blocks": blocks, "disk_read_ns": times[0], "disk_write_ns": times[1]}


def check_swaps(limits: Limits, costs: CostModel | None) -> None:
    """Raises SpecError where requests may be swapped out and a measured cost model does not know what that takes."""
    if limits.num_host_blocks and isinstance(costs, FittedCost) and not costs.prices_swaps:
        raise SpecError(
            "limits.num_host_blocks: the calibration has not measured swapping; profile anew with --host-memory"
        )


def _host_blocks(spec: RunSpec, costs: CostModel, measured: Limits | None) -> int:
    """As given, in blocks or in memory; else as the calibration's runtime had them."""
    given = spec.limits
    if given.num_host_blocks is not None:
        return given.num_host_blocks
    if given.host_memory_gib is None:
        return 0 if measured is None else measured.num_host_blocks
    if not isinstance(costs, RooflineCost):
        raise SpecError("limits.host_memory_gib: give limits.num_host_blocks; only a roofline knows a block's bytes")
    return int(given.host_memory_gib * GIB // (costs.model.kv_bytes_per_token * given.block_size))


def _measured_limits(costs: CostModel) -> Limits | None:
    """The limits of the runtime that a calibration was made on, where it says them."""
    recorded = costs.calibration.provenance.get("limits") if isinstance(costs, FittedCost) else None
    if recorded is None:
        return None
    try:
        return TypeAdapter(Limits).validate_python(recorded)
    except ValidationError as error:
        raise SpecError(f"the calibration's limits cannot be used: {error.errors()[0]['msg']}; profile anew") from None


def _blocks_that_fit(spec: RunSpec, costs: CostModel) -> int:
    if not isinstance(costs, RooflineCost):
        raise SpecError("limits.num_blocks: say how many KV blocks a replica has; only a roofline can work it out")
    model, device = costs.model, costs.device
    share = (spec.limits.memory_share or MEMORY_SHARE) * costs.tensor_parallel
    memory = share * device.memory_bytes - model.weight_bytes
    if spec.limits.kv_cache_gib is not None:
        memory = spec.limits.kv_cache_gib * GIB
    blocks = int(memory // (model.kv_bytes_per_token * spec.limits.block_size))
    if blocks < 1:
        raise SpecError(f"{model.name} leaves no memory for a KV cache on {device.name}; take a larger device")
    return blocks
