"""A policy's knob that makes no sense is refused with what it may be."""

from __future__ import annotations

import pytest

from policies.registry import PolicyError, make


@pytest.mark.parametrize(
    ("role", "text", "message"),
    [
        ("queue", "mlfq,quantum_ms=-1", "quantum_ms and alpha_ms must be 0 or more"),
        ("queue", "mlfq,levels=0", "levels between 1 and 64"),
        ("queue", "mlfq,quantum_ms=inf", "must be a finite number, not 'inf'"),
        ("predictor", "quantile,q=1.5", "q must be between 0 and 1, not 1.5"),
        ("predictor", "quantile,window=0", "window must be at least 1, not 0"),
        ("preemption", "last_admitted,mode=shred", "mode must be .*, not 'shred'"),
        ("router", "stale,refresh_ms=-1", "refresh_ms must be at least 0, not -1"),
        ("router", "shortest_delay,tokens_per_seq=0", "tokens_per_seq must be at least 1, not 0"),
    ],
)
def test_a_knob_that_makes_no_sense_is_refused(role: str, text: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        make(role, text)  # type: ignore[call-overload]
