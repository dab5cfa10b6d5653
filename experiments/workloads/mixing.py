"""Parts of a trace, and several traces as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from experiments.workloads.block_keys import reblocked
from experiments.workloads.request import NS_PER_S, Workload

INTEGER_IDS = ("session", "program")


def within(workload: Workload, from_s: float, until_s: float | None) -> Workload:
    """The requests that arrive from `from_s` on and before `until_s`, seconds since the run began; `from_s` becomes 0.

    Whose parents are left out waits for nobody. Raises ValueError where none is left.
    """
    if from_s < 0 or (until_s is not None and until_s <= from_s):
        raise ValueError(f"from {from_s:g} s to {until_s:g} s is no stretch of time; give 0 <= from < until")
    begin = round(from_s * NS_PER_S)
    kept = workload.arrival_ns >= begin
    if until_s is not None:
        kept &= workload.arrival_ns < round(until_s * NS_PER_S)
    if not kept.any():
        end = int(workload.arrival_ns[-1]) / NS_PER_S
        what = f"no request arrives from {from_s:g} s" + ("" if until_s is None else f" until {until_s:g} s")
        raise ValueError(f"{workload.name}: {what}; the last comes at {end:g} s")
    part = workload.take(np.flatnonzero(kept))
    return part.replace(arrival_ns=part.arrival_ns - begin).note("within", from_s=from_s, until_s=until_s)


def of_tenants(workload: Workload, names: Sequence[str]) -> Workload:
    """The requests of some tenants, at their times. Raises ValueError for a tenant that the workload does not have."""
    known = sorted(set(workload.tenant or ()))
    for name in names:
        if name not in known:
            shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
            raise ValueError(
                f"{workload.name} has no tenant {name!r}; " + (f"it has {shown}" if known else "it has none")
            )
    chosen = set(names)
    rows = [row for row, tenant in enumerate(workload.tenant or ()) if tenant in chosen]
    return workload.take(np.array(rows, np.intp)).note("of_tenants", names=list(names))


def mix(workloads: Sequence[Workload], name: str = "mix") -> Workload:
    """All requests of several workloads, each at its time, in order of arrival (at one time those of the first first).

    Sessions, programs and prefix blocks of different workloads are never the same ones; blocks are cut to the smallest
    size among them. Whoever has no tenant gets its workload's name for one. What only some of the workloads have and
    cannot be filled in (real texts, length hints, tools) is left out, and named in the provenance.
    """
    if len(workloads) < 2:
        raise ValueError("mixing takes at least two traces")
    block = min((w.hash_block for w in workloads if w.hash_ids is not None), default=0)
    parts = [reblocked(w, block) if w.hash_ids is not None and w.hash_block != block else w for w in workloads]
    columns: dict[str, Any] = {
        key: np.concatenate([getattr(w, key) for w in parts])
        for key in ("arrival_ns", "prompt_tokens", "output_tokens", "max_tokens")
    }
    if block:
        columns |= {"hash_ids": _distinct_blocks(parts), "hash_block": block}
    columns["tenant"] = _joined(parts, lambda w: w.tenant or [w.name] * len(w))
    columns |= _identities(parts) | _closed_loop(parts)
    if any(w.priority is not None for w in parts):
        columns["priority"] = _joined(parts, lambda w: [0] * len(w) if w.priority is None else w.priority.tolist())
    if any(w.slo is not None for w in parts):
        columns["slo"] = _joined(parts, lambda w: w.slo or [None] * len(w))
    left_out = []
    for key in ("declared_output", "texts", "tool"):
        if all(getattr(w, key) is not None for w in parts):
            columns[key] = _joined(parts, lambda w, key=key: list(getattr(w, key)))  # type: ignore[misc]
        elif any(getattr(w, key) is not None for w in parts):
            left_out.append(key)
    sources = [w.provenance for w in workloads]
    step = {"step": "mix", "requests": [len(w) for w in workloads], "left_out": left_out}
    return Workload.build(**columns, name=name, provenance={"source": "mix", "of": sources, "steps": [step]})


def _joined(parts: Sequence[Workload], column: Callable[[Workload], Iterable[Any]]) -> list[Any]:
    return [value for part in parts for value in column(part)]


def _identities(parts: Sequence[Workload]) -> dict[str, Any]:
    """Sessions and programs, numbered anew; whoever has none is one of its own."""
    columns: dict[str, Any] = {}
    for key in INTEGER_IDS:
        if any(getattr(w, key) is not None for w in parts):
            numbers: dict[tuple[int, str, int], int] = {}
            columns[key] = [
                numbers.setdefault((place, kind, number), len(numbers))
                for place, part in enumerate(parts)
                for kind, number in _numbers(part, key)
            ]
    if "session" in columns:
        columns["turn"] = _joined(parts, lambda w: [0] * len(w) if w.turn is None else w.turn.tolist())
    return columns


def _numbers(part: Workload, key: str) -> list[tuple[str, int]]:
    for kind in (key, "session"):  # a session is a program where nothing says otherwise
        column = getattr(part, kind)
        if column is not None:
            return [(kind, number) for number in column.tolist()]
    return [("request", row) for row in range(len(part))]


def _closed_loop(parts: Sequence[Workload]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    if any(w.parents is not None for w in parts):
        columns["parents"], before = [], 0
        for part in parts:
            columns["parents"] += [tuple(before + row for row in of) for of in part.parents or [()] * len(part)]
            before += len(part)
    if any(w.gap_ns is not None for w in parts):
        columns["gap_ns"] = _joined(parts, lambda w: [0] * len(w) if w.gap_ns is None else w.gap_ns.tolist())
    return columns


def _distinct_blocks(parts: Sequence[Workload]) -> list[tuple[int, ...]]:
    numbers: dict[tuple[int, int], int] = {}
    return [
        tuple(numbers.setdefault((place, block), len(numbers)) for block in ids)
        for place, part in enumerate(parts)
        for ids in part.hash_ids or [()] * len(part)
    ]
