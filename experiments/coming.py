"""Who comes to a simulation, when, and what each request carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from experiments.clients import Clients, Patience
from experiments.workloads import Workload
from experiments.workloads.block_keys import block_keys
from policies.replica_state import Limits
from policies.request import Request, Slo
from simulator.arrivals import Arrival

PATIENT = Patience()


def keys_of(workload: Workload, limits: Limits) -> Iterator[list[bytes]]:
    """Each request's block keys, with those of the blocks that it will generate; none where nothing is cached."""
    if limits.prefix_caching:
        return block_keys(workload, limits.block_size, generated=True)
    return iter([[] for _ in range(len(workload))])


@dataclass(frozen=True, slots=True)
class Coming:
    """Who comes to a simulation: at their times, and because others have ended or given up."""

    arrivals: Iterable[Arrival]
    followers: Callable[[Request, int], list[Arrival]] | None = None
    gives_up: Callable[[Request, int], list[Arrival]] | None = None


def arrivals_of(workload: Workload, limits: Limits, patience: Patience = PATIENT) -> Coming:
    """The requests of a workload's clients, with block keys where prefixes are cached."""
    keys = keys_of(workload, limits)
    if workload.parents is None and patience.timeout_ns is None:
        times = workload.arrival_ns.tolist()
        each = zip(times, keys, strict=False)
        return Coming(_arrival(workload, i, i, at, (), known) for i, (at, known) in enumerate(each))
    clients = Clients(workload, patience)
    known_keys = [known for _, known in zip(range(len(workload)), keys, strict=False)]

    def come(who: list[tuple[int, int]]) -> list[Arrival]:
        return [one(at, request_id) for at, request_id in who]

    def one(at: int, request_id: int) -> Arrival:
        i, _ = clients.row(request_id)
        arrival = _arrival(workload, i, request_id, at, clients.parents(request_id), known_keys[i])
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
