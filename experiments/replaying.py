"""A recorded run's requests through the simulator: with its step times (decision replay, whose plans must be the same),
or with those of a cost model."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import TypeAdapter

from experiments.records import Run, RunError, RunWriter, run_info
from experiments.simulated import costs_as_described
from experiments.token_times import COMPLETED
from policies.control_plane import ControlPlane, PolicyStalled
from policies.plan import CopyTimes
from policies.records import ALIVE
from policies.replica_state import Limits
from policies.request import Request, Slo, State
from policies.stack import PolicyStack, StackSpec
from simulator.arrivals import Arrival, Cancellation, Scheduled
from simulator.costs.base import CostModel
from simulator.pace import Timing
from simulator.simulation import Intervention, Simulation, replay

NEVER = 1 << 60

_COPY_COLUMNS = ("copy_out_ns", "copy_in_ns", "copy_wait_ns")


def replay_run(run: Run, folder: Path, *, overwrite: bool = False, check: bool = False) -> None:
    """Replay a run of one replica and write the replay's own run folder, to be compared with the original.

    Raises RunError where the record lacks what a replay needs.
    """
    if not run.has_decisions:
        raise RunError(f"{run.folder} was recorded without decisions; there is nothing to compare a replay with")
    if run.steps["replica"].nunique() > 1:
        raise RunError(f"{run.folder} has several replicas; replay takes the run of one")
    limits = TypeAdapter(Limits).validate_python(run.limits)
    _check_whole(run)
    spec, seed, stack = _policies(run, limits)
    interventions = _interventions(run, spec, limits.block_size, seed)
    info = _info("replay", run, ("oracle", "cost", "clients"), replay_of=run.name)
    try:
        with RunWriter(folder, info, overwrite=overwrite) as writer:
            replay(
                limits,
                stack,
                _timings(run.steps),
                _scheduled(run),
                interventions=interventions,
                cost=_cost(run),
                recorder=writer,
                check=check,
            )
    except PolicyStalled:
        if run.complete:  # otherwise it may be what ended the run itself
            raise


def simulate_record(run: Run, costs: CostModel, folder: Path, *, overwrite: bool = False, check: bool = False) -> None:
    """Simulate the requests of a recorded run of one replica, from their arrivals, with step times of a cost model.

    Limits and policies are the record's, and so are lengths and block keys: what differs is step times alone, and what
    comes of them. Clients' cancellations are left out. Raises RunError for a run that was cut short.
    """
    if not run.complete:
        raise RunError(f"{run.folder} was cut short; only a complete run can be simulated from its record")
    limits = TypeAdapter(Limits).validate_python(run.limits)
    _, _, stack = _policies(run, limits)
    info = _info("sim", run, ("oracle",), simulation_of=run.name, cost=costs.describe())
    arrivals = [_as_it_ended(one) for one in sorted(_scheduled(run), key=lambda s: s.arrival.request.key)]
    with RunWriter(folder, info, overwrite=overwrite) as writer:
        Simulation(limits, [stack], costs, recorder=writer, check=check).run(arrivals)


def _policies(run: Run, limits: Limits) -> tuple[StackSpec, int, PolicyStack]:
    """Those of the record, anew: what they are called, their seed, and the objects."""
    spec, seed = StackSpec(**run.info["stack"]), int(run.spec.get("seed", 0))
    future = _future(run) if spec.wants_future else None
    return spec, seed, spec.build(block_size=limits.block_size, seed=seed, oracle=oracle_of(run), future=future)


def _info(kind: str, run: Run, kept: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """The description of a run that is made of this one's record. `kept`: entries that it takes over where they are."""
    return run_info(
        kind,
        spec=run.spec,
        limits=run.limits,
        stack=run.info["stack"],
        clairvoyant=run.clairvoyant,
        workload=run.info["workload"],
        **more,
        **{name: run.info[name] for name in kept if name in run.info},
    )


def _as_it_ended(one: Scheduled) -> Arrival:
    """With the length that a stop string gave it."""
    how = one.cancelled
    if how is None or how.num_output_tokens is None:
        return one.arrival
    return replace(one.arrival, output_tokens=how.num_output_tokens, end=how.end)


def oracle_of(run: Run) -> dict[int, int] | None:
    """The true lengths that a clairvoyant policy was given, which may be more than what came of them."""
    lengths = run.info.get("oracle")
    return None if lengths is None else dict(enumerate(lengths))


def _future(run: Run) -> dict[int, list[bytes]]:
    """The block keys of all requests, which the policies of a simulated run were told: ids are in order of arrival."""
    if not run.complete:
        raise RunError(f"{run.folder} was cut short, and its policies were told of requests that it does not have")
    keys = {row["request_id"]: row["block_keys"] for row in run.table("requests").to_pylist()}
    return dict(sorted(keys.items()))


def _cost(run: Run) -> CostModel | None:
    """The cost model that the run's policies could plan by."""
    described = run.info.get("cost")
    return None if described is None else costs_as_described(described)


def _check_whole(run: Run) -> None:
    """A run that was killed lacks the rows of those that were alive; their arrivals are not known."""
    if run.complete or (run.requests["status"] == "unfinished").any() or not len(run.steps):
        return
    if run.steps[list(ALIVE)].iloc[-1].sum() > 0:
        raise RunError(
            f"{run.folder} was killed while requests were alive, and those are not in its record: it cannot be "
            "replayed (a run ended by Ctrl-C can)"
        )


def _timings(steps: pd.DataFrame) -> list[tuple[int, Timing]]:
    indices = steps["step"].tolist()
    if indices != list(range(len(indices))):
        raise RunError("the record's steps have gaps; it cannot be replayed")
    columns = (steps[name].tolist() for name in ("plan_ns", "launch_ns", "end_ns", "device_ns", *_COPY_COLUMNS))
    return [
        (plan, Timing(launch, end, device, CopyTimes(*copies)))
        for plan, launch, end, device, *copies in zip(*columns, strict=True)
    ]


def _scheduled(run: Run) -> list[Scheduled]:
    return [_one(row) for row in run.table("requests").to_pylist()]


def _one(row: dict[str, Any]) -> Scheduled:
    request = Request(
        row["request_id"],
        row["arrival_ns"],
        row["prompt_tokens"],
        row["max_tokens"],
        tenant=row["tenant"],
        session=row["session"],
        program=row["program"],
        parents=tuple(row["parents"]),
        priority=row["priority"],
        slo=_slo(row),
        hints=dict(row["hints"]),
    )
    before, end_before = row["before_step"], row["end_before_step"]
    end = State(row["status"]) if row["status"] in COMPLETED else None
    if end_before is None:
        output_tokens = NEVER if end is None else row["output_tokens"]
        return Scheduled(Arrival(request, output_tokens, row["block_keys"], end), before)
    how = Cancellation(end_before) if end is None else Cancellation(end_before, end, row["output_tokens"])
    return Scheduled(Arrival(request, NEVER, row["block_keys"]), before, how)


def _interventions(run: Run, spec: StackSpec, block_size: int, seed: int) -> dict[int, list[Intervention]]:
    """What an operator did while the run went on, by the step that it came before."""
    plain: dict[str, Intervention] = {
        "hold": ControlPlane.hold,
        "release": ControlPlane.release,
        "flush": ControlPlane.flush,
    }
    rows = run.decisions[run.decisions["kind"].isin(("swap", "disk", *plain))]
    found: dict[int, list[Intervention]] = {}
    intervene: Intervention
    columns = (rows[name].tolist() for name in ("step", "kind", "tokens", "reason"))
    for step, kind, tokens, reason in zip(*columns, strict=True):
        if kind == "disk":
            intervene = functools.partial(_disk_done, tokens, reason)
        elif kind == "swap":
            names = dict(part.split(": ", 1) for part in reason.split("; "))
            spec, policies = spec.rebuilt(names, block_size=block_size, seed=seed)
            intervene = functools.partial(_change, policies, names)
        else:
            intervene = plain[kind]
        found.setdefault(step, []).append(intervene)
    return found


def _disk_done(number: int, error: str, plane: ControlPlane, now: int) -> None:
    plane.disk_done(number, error, now)


def _change(policies: dict[str, Any], names: dict[str, str], plane: ControlPlane, now: int) -> None:
    plane.change_policies(policies, names, now)


def _slo(row: dict[str, Any]) -> Slo | None:
    if row["slo_value"] is None:
        return None
    return Slo(row["slo_ttft_ns"], row["slo_tpot_ns"], row["slo_e2e_ns"], row["slo_value"], row["slo_droppable"])
