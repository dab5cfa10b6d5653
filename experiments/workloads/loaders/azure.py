"""Azure LLM inference traces of 2023 (Splitwise, ISCA 2024) and 2024 (DynamoLLM, HPCA 2025).

`TIMESTAMP,ContextTokens,GeneratedTokens`. Wall clock: 2023 has 7 fractional digits and no zone (`2023-11-16
18:17:03.9799600`), 2024 has 6 and a zone (`2024-05-10 00:00:00.009930+00:00`); a whole second may have no
fraction. Lines may end in CR LF and the last may have no newline.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from experiments.workloads.errors import TraceError
from experiments.workloads.loaders.columns import CsvFormat

_CLOCK = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def wall_clock_ns(path: str, line: int, name: str, cell: str) -> int:
    """Nanoseconds since 1970. `datetime` alone would cut the seventh digit. Without a zone, UTC."""
    match = _CLOCK.fullmatch(cell.strip())
    try:
        if match is None:
            raise ValueError
        seconds, fraction, zone = match.groups()
        moment = datetime.fromisoformat(seconds + (zone or "+00:00"))
    except ValueError:
        expected = "expected YYYY-MM-DD HH:MM:SS.fraction, with or without a zone"
        raise TraceError(path, line, f"{name} is {cell!r:.40}; {expected}") from None
    return (moment - _EPOCH) // timedelta(seconds=1) * 1_000_000_000 + int((fraction or "").ljust(9, "0"))


FORMAT = CsvFormat("azure", time="TIMESTAMP", clock=wall_clock_ns, prompt="ContextTokens", output="GeneratedTokens")
