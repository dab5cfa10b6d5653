"""Workloads as files of other formats: Mooncake's, and vLLM's timed trace.

Both have a time, two lengths, prefix blocks and perhaps a session for each request, and nothing else. Mooncake's times
are whole milliseconds, a timed trace's seconds (here to the nanosecond). Every block of a prompt has an id there: where
a workload has none, the block is the request's own and gets a new one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from experiments.workloads.block_keys import reblocked
from experiments.workloads.jsonl import open_for_writing
from experiments.workloads.loaders import OWN_FORMAT, mooncake, timed_trace
from experiments.workloads.request import NS_PER_S, Workload

TARGETS = (OWN_FORMAT, mooncake.NAME, timed_trace.NAME)
_LOST = ("tenant", "priority", "declared_output", "slo", "parents", "gap_ns", "program", "tool", "texts")
Tell = Callable[[int], object]


def write(
    workload: Workload, path: str | Path, target: str, *, block_size: int | None = None, tell: Tell | None = None
) -> list[str]:
    """Write a workload in one of `TARGETS`. Gives the columns that the format has no place for.

    `block_size`: of the prefix blocks (default: the workload's own, else the format's). `tell`: called with the number
    of requests written. Raises ValueError for another target, OSError where the file cannot be written.
    """
    if target not in TARGETS:
        raise ValueError(f"cannot write {target!r}; expected one of {', '.join(TARGETS)}")
    if block_size is not None and workload.hash_ids is not None and block_size != workload.hash_block:
        workload = reblocked(workload, block_size)
    if target == OWN_FORMAT:
        workload.to_jsonl(path)
        return []
    module = mooncake if target == mooncake.NAME else timed_trace
    block = workload.hash_block if workload.hash_ids is not None else block_size or module.DEFAULT_BLOCK
    fresh = count(1 + max((max(ids, default=-1) for ids in workload.hash_ids or ()), default=-1))
    prompts, outputs = workload.prompt_tokens.tolist(), workload.output_tokens.tolist()
    with open_for_writing(Path(path)) as file:
        for row, at in enumerate(workload.arrival_ns.tolist()):
            ids = list(() if workload.hash_ids is None else workload.hash_ids[row])
            ids += [next(fresh) for _ in range(-(-prompts[row] // block) - len(ids))]
            rest: dict[str, Any] = {"input_length": prompts[row], "output_length": outputs[row], "hash_ids": ids}
            if workload.session is not None:
                rest["session_id"] = int(workload.session[row])
            time = _milliseconds(at) if target == mooncake.NAME else _seconds(at)
            file.write(f'{{"timestamp": {time}, {json.dumps(rest)[1:]}\n')
            if tell is not None and row % 500 == 0:
                tell(row)
    capped = [] if np.all(workload.max_tokens == workload.output_tokens.max()) else ["max_tokens"]
    return capped + [name for name in _LOST if getattr(workload, name) is not None]


def _milliseconds(ns: int) -> str:
    return str((ns + 500_000) // 1_000_000)


def _seconds(ns: int) -> str:
    """With a fraction always: that is what tells a timed trace."""
    whole, rest = divmod(ns, NS_PER_S)
    return f"{whole}.{rest:09d}".rstrip("0") + ("" if rest else "0")
