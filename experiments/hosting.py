"""The engine of a specification, in whichever process it is started: the model loaded, the record kept if asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.records import RunWriter, run_info
from experiments.spec import RunSpec
from policies.contract import Recorder
from runtime.serving.commands import Hosted
from runtime.serving.messages import EngineInfo
from runtime.serving.recent_rows import RecentRows

if TYPE_CHECKING:
    from runtime.weights import LoadedModel


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine does beside its work.

    Attributes:
        record: folder of the run's record; None: none is written.
        keep_rows: keep the record's newest rows in memory, for an operator to fetch.
        check: verify the control plane's invariants after every step.
    """

    record: Path | None = None
    overwrite: bool = False
    keep_rows: bool = False
    check: bool = False


@contextmanager
def host_engine(spec: RunSpec, options: EngineOptions, on_flush: Callable[[], None]) -> Iterator[Hosted]:
    """In the engine's process: load the model, start the engine, keep the record."""
    from experiments.real import load  # torch, which the front does not need

    with closing(replace(load(spec.model), tokenizer=None)) as loaded:  # text is the front's
        yield from _host(spec, options, loaded, on_flush)


def _host(spec: RunSpec, options: EngineOptions, loaded: LoadedModel, on_flush: Callable[[], None]) -> Iterator[Hosted]:
    from experiments.real import prepare, start_engine

    prepared = prepare(spec, loaded)
    limits, stack = prepared.limits, spec.policies.stack
    policies = stack.build(block_size=limits.block_size, seed=spec.seed)
    writer: RunWriter | None = None
    if options.record is not None:
        info = run_info(
            "real",
            spec=spec.model_dump(mode="json", exclude={"workload"}),
            limits=asdict(limits),
            stack=stack.as_dict(),
            clairvoyant=policies.clairvoyant,
            workload={"name": "served"},
            model=loaded.name,
            **({} if prepared.cost is None else {"cost": prepared.cost.describe()}),
        )
        writer = RunWriter(options.record, info, overwrite=options.overwrite, decisions=spec.decisions)
    rows = RecentRows(writer) if options.keep_rows else None
    recorder: Recorder | None = rows or writer
    with (
        writer or nullcontext(),
        start_engine(
            loaded,
            limits,
            policies,
            prepared.spec.model,
            recorder=recorder,
            cost=prepared.cost,
            seed=spec.seed,
            check=options.check,
            on_flush=on_flush,
        ) as engine,
    ):
        about = EngineInfo(
            loaded.name,
            loaded.config.vocab_size,
            limits,
            stack.as_dict(),
            {**prepared.seconds, **engine.startup_seconds},
            spec.model.device,
            spec.model.dtype,
            os.getpid(),
            None if options.record is None else str(options.record),
            None if prepared.cost is None else dict(prepared.cost.describe()),
        )
        yield Hosted(engine, about, stack, spec.seed, rows)
