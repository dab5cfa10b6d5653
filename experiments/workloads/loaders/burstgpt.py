"""BurstGPT (KDD 2025), both releases: `Timestamp` (s), `Model`, `Request tokens`, `Response tokens`,
`Total tokens`, `Log Type`; release 2 adds `Session ID` and `Elapsed time`.

Failed requests have zero tokens and are dropped. Session ids are text; they are numbered in order of
appearance.
"""

from __future__ import annotations

from experiments.workloads.loaders.columns import CsvFormat, unit

FORMAT = CsvFormat(
    "burstgpt",
    time="Timestamp",
    clock=unit(1_000_000_000),
    prompt="Request tokens",
    output="Response tokens",
    optional_session="Session ID",
)
