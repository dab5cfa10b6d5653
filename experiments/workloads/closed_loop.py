"""Requests that come because others have ended: the turns of a session, the calls of an agent.

A request with `parents` comes `gap_ns` after the last of them has ended, however long that took: a user's think time,
or a tool's. Its `arrival_ns` is then only where it would come if nothing took any time, and gives it its place in the
workload. One without parents, a root, comes at its `arrival_ns`. That a parent ended badly (cancelled, refused,
dropped) makes no difference, so that every run has the same requests.

`Followers` says who comes next, in both panels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from experiments.workloads.generators.streams import stream

if TYPE_CHECKING:
    from experiments.workloads.request import Workload

Parents = list[tuple[int, ...]]


class Followers:
    """Who of a workload comes, and when, as others end. Whoever has no parents is not its business."""

    def __init__(self, workload: Workload) -> None:
        parents = workload.parents or []
        self._gaps = [0] * len(workload) if workload.gap_ns is None else workload.gap_ns.tolist()
        self._missing = {i: len(of) for i, of in enumerate(parents) if of}
        self._children: dict[int, list[int]] = {}
        for i, of in enumerate(parents):
            for parent in of:
                self._children.setdefault(parent, []).append(i)

    def __len__(self) -> int:
        """How many are still to come."""
        return len(self._missing)

    def ended(self, request: int, now: int) -> list[tuple[int, int]]:
        """A request has ended: (when, who) of those that now wait for nobody else, in order of both."""
        free = []
        for child in self._children.pop(request, ()):
            self._missing[child] -= 1
            if not self._missing[child]:
                del self._missing[child]
                free.append((now + self._gaps[child], child))
        return sorted(free)


def check_parents(parents: Sequence[tuple[int, ...]]) -> None:
    """Raise ValueError for parents that are no requests before the one that names them, or named twice."""
    for i, of in enumerate(parents):
        if len(set(of)) < len(of):
            raise ValueError(f"request {i} names a parent twice")
        for parent in of:
            if not 0 <= parent < i:
                raise ValueError(f"request {i} has the parent {parent}; parents are requests that come before it")


def renumbered(parents: Sequence[tuple[int, ...]], rows: NDArray[np.intp]) -> Parents:
    """The parents of the kept rows by their new numbers; those that are left out are waited for no more."""
    new = {old: i for i, old in enumerate(rows.tolist())}
    return [tuple(new[parent] for parent in parents[old] if parent in new) for old in new]


def roots(workload: Workload) -> NDArray[np.int64]:
    """For each request the root that it, by its first parents, goes back to; for a root itself."""
    root = np.arange(len(workload))
    for i, of in enumerate(workload.parents or []):
        if of:
            root[i] = root[of[0]]
    return root


def with_root_arrivals(workload: Workload, times_ns: NDArray[np.int64]) -> Workload:
    """The roots at new times, in their order; everybody else as long after their root as before."""
    root = roots(workload)
    new = np.zeros(len(workload), np.int64)
    new[root == np.arange(len(workload))] = times_ns
    new = new[root] + workload.arrival_ns - workload.arrival_ns[root]
    for i, of in enumerate(workload.parents or []):
        if len(of) > 1:  # whose roots may be others
            new[i] = max(new[i], new[list(of)].max())
    order = np.argsort(new, kind="stable")
    return workload.replace(arrival_ns=np.zeros_like(new)).take(order).replace(arrival_ns=new[order])


def by_turns(workload: Workload, think_s: float | None, seed: int) -> Workload:
    """An open-loop trace of sessions as a closed loop: each turn comes after the end of the one before it.

    Think times are the trace's, or exponential with a mean of `think_s` where that is given. Raises ValueError where
    there are no sessions, or no think times.
    """
    if workload.session is None:
        raise ValueError(f"{workload.name} has no sessions, which a closed loop is made of")
    if workload.parents is not None:
        raise ValueError(f"{workload.name} is a closed loop already; leave closed out")
    gaps = workload.gap_ns
    if think_s is not None:
        gaps = np.rint(1e9 * stream(seed, "think").exponential(think_s, len(workload))).astype(np.int64)
    if gaps is None:
        raise ValueError(f"{workload.name} does not say how long users think between turns; give think_s")
    last: dict[int, int] = {}
    parents: Parents = []
    for i, session in enumerate(workload.session.tolist()):
        parents.append((last[session],) if session in last else ())
        last[session] = i
    return workload.replace(parents=parents, gap_ns=gaps).note("by_turns", think_s=think_s, seed=seed)
