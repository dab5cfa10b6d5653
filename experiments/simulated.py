"""Running a specification in the simulated panel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from experiments.clients import Clients, Patience
from experiments.records import RunWriter, read_run, run_info
from experiments.spec import CostSpec, RunSpec, SpecError
from experiments.timeline import check_books
from experiments.workloads import Workload, make_workload
from experiments.workloads.block_keys import block_keys
from policies import registry
from policies.contract import Router
from policies.model_shape import ModelShape
from policies.registry import PolicySpec
from policies.replica_state import Limits
from policies.request import Request, Slo
from simulator.arrivals import Arrival
from simulator.costs.base import CostModel
from simulator.costs.calibration import Calibration
from simulator.costs.constant import ConstantCost
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
    costs = costs or make_costs(spec.cost or CostSpec())
    limits = limits or simulated_limits(spec, costs)
    patience = patience_of(spec)
    oracle = oracle_of(workload, patience)
    future = _future(spec, workload, limits)
    build = spec.policies.stack.build
    stacks = [
        build(block_size=limits.block_size, seed=spec.seed, oracle=oracle, future=future) for _ in range(spec.replicas)
    ]
    router, link = make_router(spec, costs, limits)
    info = run_info(
        "sim",
        spec=spec.model_dump(mode="json"),
        limits=asdict(limits),
        stack=spec.policies.stack.as_dict(),
        clairvoyant=stacks[0].clairvoyant,
        **oracle_entry(oracle, stacks[0].clairvoyant),
        **clients_entry(workload, patience),
        workload=workload.provenance,
        cost=costs.describe(),
    )
    with RunWriter(folder, info, overwrite=overwrite, decisions=spec.decisions, flush_seconds=flush_seconds) as writer:
        routing = router if spec.replicas > 1 else None  # the real panel, which has one, routes nothing either
        coming = arrivals_of(workload, limits, patience)
        simulation = Simulation(
            *(limits, stacks, costs, routing),
            link=link,
            recorder=writer,
            on_end=on_end,
            followers=coming.followers,
            gives_up=coming.gives_up,
            check=check,
        )
        simulated_ns = simulation.run(coming.arrivals)
    if check:
        check_books(read_run(folder))
    return simulated_ns


def router_class(spec: RunSpec) -> type:
    """The class of a specification's router."""
    return registry.find("router", PolicySpec.parse(spec.policies.router).name)


def make_router(spec: RunSpec, costs: CostModel, limits: Limits) -> tuple[Router, LinkSpeed | None]:
    """A specification's router, and the speed of the links where it moves KV. Raises PolicyError, SpecError."""
    link = link_of(spec, costs, limits) if registry.moves_kv(router_class(spec)) else None
    router = registry.make(
        "router", spec.policies.router, seed=spec.seed, block_size=limits.block_size, cost=costs, transfer=link
    )
    return router, link


def link_of(spec: RunSpec, costs: CostModel, limits: Limits) -> LinkSpeed:
    """How fast KV moves between the replicas. Raises SpecError where nobody knows."""
    model, device = getattr(costs, "model", None), getattr(costs, "device", None)
    if not isinstance(model, ModelShape) or not isinstance(device, Device):
        raise SpecError(
            f"router {spec.policies.router} moves KV cache, and only a roofline (--model, --device) knows its bytes"
        )
    bandwidth = spec.link.bandwidth or device.reached_peer_link
    return LinkSpeed(bandwidth, model.kv_bytes_per_token * limits.block_size, round(1e3 * spec.link.latency_us))


def _future(spec: RunSpec, workload: Workload, limits: Limits) -> dict[int, list[bytes]] | None:
    """The block keys of all requests, in order of arrival, where a policy asks for them."""
    if not spec.policies.stack.wants_future:
        return None
    if spec.replicas > 1:
        raise SpecError(
            "a policy that is told the block keys to come needs one replica: a router decides who gets what"
        )
    if workload.parents is not None or spec.workload.timeout_s is not None:
        raise SpecError(
            "a policy that is told the block keys to come needs arrivals that are known: no closed loop, no timeout_s"
        )
    return dict(enumerate(_keys(workload, limits)))


def _keys(workload: Workload, limits: Limits) -> Iterator[list[bytes]]:
    """Each request's block keys, with those of the blocks that it will generate; none where nothing is cached."""
    if limits.prefix_caching:
        return block_keys(workload, limits.block_size, generated=True)
    return iter([[] for _ in range(len(workload))])


PATIENT = Patience()


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
        return FittedCost.load(Path(spec.calibration))
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
                return FittedCost(Calibration.model_validate(upgraded(fields)))
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
    for name, otherwise in (("capture_sizes", ()), ("mixed_capture_sizes", ()), ("plan_lead_ns", None)):
        fields[name] = getattr(given, name)
        if fields[name] is None:
            fields[name] = getattr(measured, name) if measured is not None else otherwise
    limits = Limits(**fields)
    check_swaps(limits, costs)
    check_offload(spec, limits)
    return limits


def check_offload(spec: RunSpec, limits: Limits) -> None:
    """Raises SpecError where prefixes are to be kept in host memory and there is none."""
    offload = spec.policies.offload
    if offload != "never" and not limits.num_host_blocks:
        raise SpecError(f"policies.offload: {offload} keeps prefixes in host memory; give some with --host-memory GIB")


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
    memory = (
        spec.limits.memory_share or MEMORY_SHARE
    ) * device.memory_bytes * costs.tensor_parallel - model.weight_bytes
    if spec.limits.kv_cache_gib is not None:
        memory = spec.limits.kv_cache_gib * GIB
    blocks = int(memory // (model.kv_bytes_per_token * spec.limits.block_size))
    if blocks < 1:
        raise SpecError(f"{model.name} leaves no memory for a KV cache on {device.name}; take a larger device")
    return blocks


@dataclass(frozen=True, slots=True)
class Coming:
    """Who comes to a simulation: at their times, and because others have ended or given up."""

    arrivals: Iterable[Arrival]
    followers: Callable[[Request, int], list[Arrival]] | None = None
    gives_up: Callable[[Request, int], list[Arrival]] | None = None


def arrivals_of(workload: Workload, limits: Limits, patience: Patience = PATIENT) -> Coming:
    """The requests of a workload's clients, with block keys where prefixes are cached."""
    keys = _keys(workload, limits)
    if workload.parents is None and patience.timeout_ns is None:
        times = workload.arrival_ns.tolist()
        each = zip(times, keys, strict=False)
        return Coming(_arrival(workload, i, i, at, (), known) for i, (at, known) in enumerate(each))
    clients = Clients(workload, patience)
    keys_of = [known for _, known in zip(range(len(workload)), keys, strict=False)]

    def come(who: list[tuple[int, int]]) -> list[Arrival]:
        return [one(at, request_id) for at, request_id in who]

    def one(at: int, request_id: int) -> Arrival:
        i, _ = clients.row(request_id)
        arrival = _arrival(workload, i, request_id, at, clients.parents(request_id), keys_of[i])
        arrival.timeout_ns = patience.timeout_ns
        return arrival

    return Coming(
        come(clients.first()),
        lambda request, now: come(clients.ended(request.id, now)),
        None if patience.timeout_ns is None else lambda request, now: come(clients.gives_up(request.id, now)),
    )


def _arrival(
    workload: Workload, i: int, request_id: int, at: int, parents: tuple[int, ...], keys: list[bytes]
) -> Arrival:
    """Request i of a workload, as the one with this id."""
    told = request_details(workload, i)
    request = Request(
        request_id,
        at,
        int(workload.prompt_tokens[i]),
        int(workload.max_tokens[i]),
        tenant=told.tenant,
        session=told.session,
        program=told.program,
        parents=parents,
        priority=told.priority,
        slo=told.slo,
        hints=told.hints,
    )
    return Arrival(request, int(workload.output_tokens[i]), keys)


@dataclass(frozen=True, slots=True)
class RequestDetails:
    """What a request carries beside its lengths."""

    tenant: str
    session: int | None
    program: int | None
    priority: int
    slo: Slo | None
    hints: dict[str, float]


def request_details(workload: Workload, i: int) -> RequestDetails:
    """The details of request i, for both panels. Where nobody says otherwise a session is a program: its turns make one
    job."""
    hints = {}
    if workload.declared_output is not None:
        hints["output_tokens"] = float(workload.declared_output[i])
    if workload.tool is not None and workload.tool[i] >= 0:
        hints["tool"] = float(workload.tool[i])
    session = None if workload.session is None else int(workload.session[i])
    return RequestDetails(
        tenant="" if workload.tenant is None else workload.tenant[i],
        session=session,
        program=session if workload.program is None else int(workload.program[i]),
        priority=0 if workload.priority is None else int(workload.priority[i]),
        slo=None if workload.slo is None else workload.slo[i],
        hints=hints,
    )
