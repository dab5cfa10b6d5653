"""Figures that have been made are kept for as long as their runs are: making one takes longer than sending it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from weakref import WeakKeyDictionary, ref

import plotly.graph_objects as go

from dashboard import theme
from experiments.records import Run

MOST = 24
"""Figures that are kept of one run, the latest ones."""

_KEPT: WeakKeyDictionary[Run, dict[Hashable, go.Figure]] = WeakKeyDictionary()


def kept(runs: Sequence[Run], what: Hashable, make: Callable[[], go.Figure]) -> go.Figure:
    """The figure `what` of these runs, made once for a light and once for a dark page. It must not be changed."""
    known = _KEPT.setdefault(runs[0], {})
    key = (what, theme.dark(), *(ref(run) for run in runs))
    if key not in known:
        while len(known) >= MOST:
            known.pop(next(iter(known)), None)
        known[key] = make()
    return known[key]
