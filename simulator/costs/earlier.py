"""Calibrations of the earlier format: in records of runs whose policies planned by them, and must decide alike again.

A file of it is refused (`Calibration.load`): what was fitted then is less exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIRST_FORMAT = "diptych-calibration-1"


def upgraded(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same prices in today's format, where they are a special case; what is of today's format as it is.

    Raises KeyError for what is of neither.
    """
    if content.get("format") != FIRST_FORMAT:
        return dict(content)
    kept = {name: content[name] for name in ("provenance", "ranges", "held_out")}
    graph, eager = content["graph"], content["eager"]
    return {
        **kept,
        "decode": graph and _mode(graph),
        "chunked": graph and _mode(graph),
        "other": eager and _mode(eager),
        "swap": content.get("swap"),
    }


def _mode(fit: Mapping[str, Any]) -> dict[str, Any]:
    device = dict(fit["device"])
    curves = {name: [{"above": 0, "ns": device.pop(name)}] for name in ("decode_context", "max_context")}
    return {
        **{name: fit[name] for name in ("num_samples", "num_finish_samples", "prepare", "finish")},
        "padded_tokens": fit["tokens"],
        **curves,
        "context_by_size": [{"above": 0, "ns": 0.0}],
        "device": {"any_decode": 0.0, "chunk_tokens": 0.0, **device},
    }
