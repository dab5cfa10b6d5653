"""Running a specification in the simulated panel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from experiments.records import RunWriter, read_run, run_info
from experiments.spec import CostSpec, RunSpec, SpecError
from experiments.timeline import check_books
from experiments.workloads import Workload, make_workload
from experiments.workloads.block_keys import block_keys
from experiments.workloads.closed_loop import Followers
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
    oracle = dict(enumerate(workload.output_tokens.tolist()))
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
        workload=workload.provenance,
        cost=costs.describe(),
    )
    with RunWriter(folder, info, overwrite=overwrite, decisions=spec.decisions, flush_seconds=flush_seconds) as writer:
        routing = router if spec.replicas > 1 else None  # the real panel, which has one, routes nothing either
        arrivals, followers = arrivals_of(workload, limits)
        simulation = Simulation(
            *(limits, stacks, costs, routing),
            link=link,
            recorder=writer,
            on_end=on_end,
            followers=followers,
            check=check,
        )
        simulated_ns = simulation.run(arrivals)
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
    if workload.parents is not None:
        raise SpecError("a policy that is told the block keys to come needs arrivals that are known: no closed loop")
    return dict(enumerate(_keys(workload, limits)))


def _keys(workload: Workload, limits: Limits) -> Iterator[list[bytes]]:
    """Each request's block keys, with those of the blocks that it will generate; none where nothing is cached."""
    if limits.prefix_caching:
        return block_keys(workload, limits.block_size, generated=True)
    return iter([[] for _ in range(len(workload))])


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
    return RooflineCost(ModelShape.preset(spec.model).in_dtype(spec.dtype), load_device(spec.device))


def costs_as_described(description: dict[str, Any]) -> CostModel:
    """The cost model that a run's record describes: what `CostModel.describe` gave. Raises SpecError."""
    fields = {name: value for name, value in description.items() if name != "kind"}
    try:
        match description.get("kind"):
            case "fitted":
                return FittedCost(Calibration.model_validate(fields))
            case "constant":
                return ConstantCost(**fields)
            case "roofline":
                model, device = ModelShape.from_dict(fields.pop("model")), Device.from_dict(fields.pop("device"))
                return RooflineCost(model, device, dtype=fields.pop("dtype"), host=HostTimes(**fields))
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
    return limits


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
    memory = (spec.limits.memory_share or MEMORY_SHARE) * device.memory_bytes - model.weight_bytes
    if spec.limits.kv_cache_gib is not None:
        memory = spec.limits.kv_cache_gib * GIB
    blocks = int(memory // (model.kv_bytes_per_token * spec.limits.block_size))
    if blocks < 1:
        raise SpecError(f"{model.name} leaves no memory for a KV cache on {device.name}; take a larger device")
    return blocks


Follow = Callable[[Request, int], list[Arrival]]


def arrivals_of(workload: Workload, limits: Limits) -> tuple[Iterable[Arrival], Follow | None]:
    """The requests that come at their times, and in a closed loop who follows from whose end."""
    everybody = _arrivals(workload, limits)
    if workload.parents is None:
        return everybody, None
    made, followers = list(everybody), Followers(workload)

    def follow(request: Request, now: int) -> list[Arrival]:
        come = []
        for at, i in followers.ended(request.id, now):
            made[i].request.arrival_ns = at
            come.append(made[i])
        return come

    return [arrival for arrival in made if not arrival.request.parents], follow


def _arrivals(workload: Workload, limits: Limits) -> Iterator[Arrival]:
    """The workload's requests, ids 0, 1, ... in order, with block keys where prefixes are cached."""
    keys = _keys(workload, limits)
    rows = zip(
        *(column.tolist() for column in (workload.arrival_ns, workload.prompt_tokens, workload.max_tokens)), strict=True
    )
    outputs = workload.output_tokens.tolist()
    for i, ((arrival_ns, prompt, cap), known) in enumerate(zip(rows, keys, strict=False)):
        told = request_details(workload, i)
        request = Request(
            *(i, arrival_ns, prompt, cap, told.tenant, told.session, told.program, told.parents),
            *(told.priority, told.slo, told.hints),
        )
        yield Arrival(request, outputs[i], known)


@dataclass(frozen=True, slots=True)
class RequestDetails:
    """What a request carries beside its lengths."""

    tenant: str
    session: int | None
    program: int | None
    parents: tuple[int, ...]
    priority: int
    slo: Slo | None
    hints: dict[str, float]


def request_details(workload: Workload, i: int) -> RequestDetails:
    """The details of request i, for both panels. Where nobody says otherwise a session is a program: its turns make one
    job. Ids are numbers of the workload's requests in both panels, so parents are these."""
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
        parents=() if workload.parents is None else workload.parents[i],
        priority=0 if workload.priority is None else int(workload.priority[i]),
        slo=None if workload.slo is None else workload.slo[i],
        hints=hints,
    )
