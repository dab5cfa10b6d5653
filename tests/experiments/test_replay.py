"""Decision replay: a real run, taken through the simulator, must come out the same in every step."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from experiments.divergence import diff_decisions
from experiments.real import load, run_real
from experiments.records import RunError, RunWriter, read_run, run_info
from experiments.replaying import replay_run
from experiments.spec import RunSpec, check_spec
from experiments.timeline import check_books
from experiments.workloads import Workload
from policies.key_queue import KeyQueue
from policies.plan import Report
from policies.replica_state import Limits
from policies.request import Request, Slo, State
from policies.stack import StackSpec
from runtime.engine import Details, Engine
from runtime.sampling.params import SamplingParams
from runtime.weights import LoadedModel

SCHEDULERS = [
    "static,max_batch_size=3",
    "prefill_first",
    "mixed",
    "mixed,long_prefill_threshold=24",
    "sarathi,chunk_size=48",
]


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load(check_spec(_spec("mixed", 0, False)).model)


def _spec(scheduler: str, lag: int, caching: bool, queue: str = "fcfs") -> dict[str, object]:
    return {
        "workload": {"name": "fixed", "n": 1},
        "model": {"source": "tiny", "load_format": "dummy"},
        "policies": {"scheduler": scheduler, "queue": queue},
        "limits": {
            "num_blocks": 24,
            "max_num_seqs": 6,
            "max_num_batched_tokens": 64,
            "max_model_len": 200,
            "prefix_caching": caching,
            "lag": lag,
        },
    }


def _workload(seed: int) -> Workload:
    """Requests that share prefixes and want more memory than there is."""
    draw = np.random.default_rng(seed)
    prompts, outputs = draw.integers(20, 110, 24), draw.integers(1, 60, 24)
    shared = [tuple(range(draw.integers(0, 4))) for _ in prompts]
    ids = [tuple(i for i in ids if (i + 1) * 16 <= p) for ids, p in zip(shared, prompts, strict=True)]
    arrivals = np.sort(draw.integers(0, 400_000_000, 24))
    return Workload.build(
        arrivals, prompts, outputs, hash_ids=ids, hash_block=16, max_tokens=outputs + draw.integers(0, 20, 24),
        priority=draw.integers(0, 3, 24),
    )  # fmt: skip


def _assert_replays(folder: Path, steps_like: bool = True) -> None:
    recorded = read_run(folder)
    replay_run(recorded, folder.with_name("replay"), check=True)
    replayed = read_run(folder.with_name("replay"))
    assert diff_decisions(recorded, replayed) is None
    assert len(recorded.decisions) > 50
    check_books(recorded)
    check_books(replayed)
    if steps_like:
        assert recorded.steps.equals(replayed.steps)


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_real_run_replays_without_a_divergence(
    scheduler: str, lag: int, caching: bool, tiny: LoadedModel, tmp_path: Path
) -> None:
    spec: RunSpec = check_spec(_spec(scheduler, lag, caching))
    run_real(spec, tmp_path / "real", workload=_workload(3), loaded=tiny, check=True)
    run = read_run(tmp_path / "real")
    assert set(run.requests["status"]) <= {"stop", "length"}
    if not scheduler.startswith("static"):
        assert run.requests["preemptions"].sum() > 0
    if caching:
        assert run.requests["cached_tokens"].sum() > 0
    _assert_replays(tmp_path / "real")


def test_a_run_that_plans_late_replays_without_a_divergence(tiny: LoadedModel, tmp_path: Path) -> None:
    given = _spec("mixed", 1, True)
    spec = check_spec(given | {"limits": {**given["limits"], "plan_lead_ms": 0.2}})  # type: ignore[dict-item]
    assert spec.limits.plan_lead_ns == 200_000
    run_real(spec, tmp_path / "real", workload=_workload(3), loaded=tiny, check=True)
    assert set(read_run(tmp_path / "real").requests["status"]) <= {"stop", "length"}
    _assert_replays(tmp_path / "real")


@pytest.mark.parametrize("queue", ["priority", "sjf", "sjf,predictor=oracle"])
def test_every_queue_replays_without_a_divergence(queue: str, tiny: LoadedModel, tmp_path: Path) -> None:
    spec = check_spec(_spec("mixed", 1, True, queue))
    run_real(spec, tmp_path / "real", workload=_workload(5), loaded=tiny)
    assert read_run(tmp_path / "real").clairvoyant == ("oracle" in queue)
    _assert_replays(tmp_path / "real")


@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_with_sampling_stops_refusals_and_cancellations_replays_without_a_divergence(
    lag: int, tiny: LoadedModel, tmp_path: Path
) -> None:
    limits = Limits(24, 16, 6, 64, 200, lag=lag)
    stack = StackSpec("mixed")
    info = run_info("real", spec={}, limits=asdict(limits), stack=stack.as_dict(), clairvoyant=False, workload={})
    chance = random.Random(lag)
    with RunWriter(tmp_path / "real", info) as writer, Engine(tiny, limits, stack.build(), recorder=writer) as engine:
        ended = threading.Semaphore(0)

        def listen(output: object) -> None:
            if getattr(output, "finish_reason", None) is not None:
                ended.release()

        ids = []
        for i in range(40):
            prompt = [7] * 32 + [i % 200] * chance.randrange(1, 250 if i % 10 == 9 else 80)
            params = SamplingParams(max_tokens=chance.randrange(1, 60), stop_token_ids=tuple(range(20)), seed=i)
            ids.append(engine.submit(prompt, params, listen, Details(priority=i % 2)))
            if chance.random() < 0.4:
                engine.cancel(chance.choice(ids))
            time.sleep(chance.random() * 0.02)
        for _ in ids:
            ended.acquire()
    statuses = set(read_run(tmp_path / "real").requests["status"])
    assert {"cancelled", "refused"} <= statuses
    assert statuses & {"stop", "length"}
    _assert_replays(tmp_path / "real")


class Nosy(KeyQueue):
    """An order that hangs on everything a policy is told of a request, and on how requests end."""

    def __init__(self) -> None:
        super().__init__()
        self.stops: Counter[str] = Counter()

    def rank(self, request: Request) -> tuple[float, ...]:
        slo = request.slo or Slo()
        return (
            self.stops[request.tenant] % 3,
            -slo.value,
            request.hints.get("share", 1.0) + request.hints.get("output_tokens", 0.0),
            (request.program or 0) + 2 * (request.session or 0) + sum(request.parents),
            (slo.ttft_ns or 5) + (slo.tpot_ns or 6) + (slo.e2e_ns or 7) + slo.droppable,
        )

    def on_report(self, report: Report) -> None:
        self.stops.update(r.tenant for r, end, _ in report.finished if end is State.STOPPED)


def _told(i: int) -> Details:
    chance = random.Random(i)
    slo = Slo(*(chance.choice((None, chance.randrange(9))) for _ in range(3)), value=chance.choice((0.5, 1.0, 2.0)))
    return Details(
        tenant=chance.choice("ab"),
        session=chance.choice((None, 3)),
        program=chance.choice((None, chance.randrange(4))),
        parents=tuple(range(chance.randrange(3))),
        slo=chance.choice((None, slo, replace(slo, droppable=True))),
        hints={name: chance.random() for name in ("share", "output_tokens", "unused")[: chance.randrange(4)]},
    )


@pytest.mark.parametrize("lag", [0, 1])
def test_a_policy_is_told_the_same_of_every_request_in_a_replay(lag: int, tiny: LoadedModel, tmp_path: Path) -> None:
    limits = Limits(24, 16, 3, 64, 200, lag=lag)
    stack = StackSpec("mixed", queue=f"{__name__}:Nosy")
    info = run_info("real", spec={}, limits=asdict(limits), stack=stack.as_dict(), clairvoyant=False, workload={})
    # The model says one token in five for ever, so some requests stop with their last allowed token.
    each = [SamplingParams(max_tokens=3 + i % 9, stop_token_ids=tuple(range(100)), seed=i) for i in range(40)]
    with RunWriter(tmp_path / "real", info) as writer, Engine(tiny, limits, stack.build(), recorder=writer) as engine:
        for wave in (range(20), range(20, 40)):  # how the first ones end decides the order of the second ones
            engine.generate([[5 + i] * 20 for i in wave], each[wave.start : wave.stop], [_told(i) for i in wave])
    requests = read_run(tmp_path / "real").requests
    at_cap = requests["output_tokens"] == requests["max_tokens"]
    assert {"stop", "length"} == set(requests["status"][at_cap])
    _assert_replays(tmp_path / "real")


def test_a_changed_policy_is_found_out(tiny: LoadedModel, tmp_path: Path) -> None:
    run_real(check_spec(_spec("mixed", 0, False)), tmp_path / "real", workload=_workload(3), loaded=tiny)
    run = read_run(tmp_path / "real")
    run.info["stack"]["scheduler"] = "sarathi,chunk_size=32"
    replay_run(run, tmp_path / "replay")
    assert diff_decisions(run, read_run(tmp_path / "replay")) is not None


def test_a_clairvoyant_policy_is_told_the_same_lengths_in_a_replay(tiny: LoadedModel, tmp_path: Path) -> None:
    # Longer than the model's limit lets them become: what came of them is not what the policy was told.
    work = Workload.build([0] * 12, [150] * 12, [50 + 30 * (i % 5) for i in range(12)], max_tokens=[300] * 12)
    run_real(
        check_spec(_spec("mixed", 1, False, "sjf,predictor=oracle")), tmp_path / "real", workload=work, loaded=tiny
    )
    _assert_replays(tmp_path / "real")


def test_a_killed_run_is_not_replayed(tiny: LoadedModel, tmp_path: Path) -> None:
    run_real(check_spec(_spec("mixed", 0, False)), tmp_path / "real", workload=_workload(3), loaded=tiny)
    run = read_run(tmp_path / "real")
    run.complete = False
    run.steps.loc[run.steps.index[-1], "num_running"] = 2
    with pytest.raises(RunError, match="killed"):
        replay_run(run, tmp_path / "replay")


def test_collections_are_rare_while_requests_are_served(tiny: LoadedModel, tmp_path: Path) -> None:
    """With PyTorch that takes longer than many steps."""
    spec = check_spec(_spec("mixed", 0, False) | {"workload": {"name": "fixed", "n": 3}})
    before, seen = gc.get_threshold(), []
    run_real(spec, tmp_path / "run", loaded=tiny, on_output=lambda output: seen.append(gc.get_threshold()))
    assert gc.get_threshold() == before
    assert min(threshold[0] for threshold in seen) > before[0]
