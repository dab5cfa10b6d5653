"""What every loader shares: checked values in, columns out, and the rules between a source's rows and a
workload.

Rules, the same for every format: arrivals are shifted so that the first kept request is at 0; rows out of
order are sorted (ties keep the file's order); rows with no prompt or no output tokens cannot be served and
are dropped; a source without arrival times has all requests at 0. What was done is counted in the
provenance.
"""

from __future__ import annotations

from array import array
from collections.abc import MutableSequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.workloads.errors import TraceError
from experiments.workloads.request import Workload

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


@dataclass
class TraceRows:
    """A trace as its file has it: columns of plain integers, in the file's order, nothing dropped.

    `arrival_ns` counts from the source's own origin. `line` is where each row came from. `gap_known`: whether the
    source says the gap (else 0 stands there). `nested`: whether a call is a sub-agent's. `one_clock`: times of
    different sessions can be compared.
    """

    path: str
    format: str
    arrival_ns: array[int] = field(default_factory=lambda: array("q"))
    prompt_tokens: array[int] = field(default_factory=lambda: array("q"))
    output_tokens: array[int] = field(default_factory=lambda: array("q"))
    line: array[int] = field(default_factory=lambda: array("q"))
    tenant: list[str] | None = None
    session: MutableSequence[int] | None = None
    turn: MutableSequence[int] | None = None
    hash_ids: list[tuple[int, ...]] | None = None
    gap_ns: MutableSequence[int] | None = None
    gap_known: list[bool] | None = None
    nested: list[bool] | None = None
    hash_block: int = 0
    has_arrivals: bool = True
    one_clock: bool = True

    def add(self, line: int, arrival_ns: int, prompt_tokens: int, output_tokens: int) -> None:
        """Append the columns that every format has."""
        if abs(arrival_ns) > INT64_MAX:
            raise TraceError(self.path, line, f"time {arrival_ns} ns is out of range; expected 64-bit")
        self.line.append(line)
        self.arrival_ns.append(arrival_ns)
        self.prompt_tokens.append(prompt_tokens)
        self.output_tokens.append(output_tokens)

    def to_workload(self) -> Workload:
        """Apply the rules of this module.

        Raises:
            TraceError: no row is left.
        """
        arrival = np.array(self.arrival_ns, np.int64)
        prompts = np.array(self.prompt_tokens, np.int64)
        outputs = np.array(self.output_tokens, np.int64)
        rows = np.flatnonzero((prompts > 0) & (outputs > 0))
        if not len(rows):
            raise TraceError(self.path, None, "no request with prompt and output tokens; expected at least one")
        steps: list[dict[str, Any]] = []
        if len(rows) < len(prompts):
            no_prompt = int(np.sum(prompts <= 0))
            no_output = int(np.sum((outputs <= 0) & (prompts > 0)))
            steps.append({"step": "drop_zero_lengths", "no_prompt": no_prompt, "no_output": no_output})
        arrival = arrival[rows]
        if np.any(np.diff(arrival) < 0):
            steps.append({"step": "sort_by_arrival", "out_of_order": int(np.sum(np.diff(arrival) < 0))})
        if not self.has_arrivals:
            steps.append({"step": "all_at_zero", "why": "the source has no arrival times"})
        optional = {
            name: None if column is None else _kept(column, rows)
            for name, column in (
                ("tenant", self.tenant),
                ("session", self.session),
                ("turn", self.turn),
                ("hash_ids", self.hash_ids),
                ("gap_ns", self.gap_ns),
            )
        }
        source = {"source": Path(self.path).name, "format": self.format, "seed": None, "steps": steps}
        return Workload.build(
            arrival - arrival.min(),
            prompts[rows],
            outputs[rows],
            **optional,
            hash_block=self.hash_block,
            name=trace_name(self.path),
            provenance=source,
        )


def _kept(column: Any, rows: NDArray[np.intp]) -> Any:
    """The rows that are kept, without a copy where all are."""
    if len(rows) == len(column):
        return column
    return np.array(column)[rows] if isinstance(column, array) else [column[row] for row in rows.tolist()]


def trace_name(path: str | Path) -> str:
    """The file's name without its endings."""
    return Path(path).name.removesuffix(".gz").rsplit(".", 1)[0]


def token_count(path: str, line: int, name: str, value: Any) -> int:
    """A token count from a CSV cell or a JSON value: a whole number from 0 to 2^31 - 1."""
    count = _whole(value)
    if count is None or not 0 <= count <= INT32_MAX:
        raise TraceError(path, line, f"{name} is {str(value)!r:.40}; expected a whole number of tokens, 0 or more")
    return count


def whole_number(path: str, line: int, name: str, value: Any) -> int:
    """A 64-bit whole number (an id, a turn) from a CSV cell or a JSON value."""
    number = _whole(value)
    if number is None or abs(number) > INT64_MAX:
        raise TraceError(path, line, f"{name} is {str(value)!r:.40}; expected a whole number")
    return number


def _whole(value: Any) -> int | None:
    if type(value) is int:
        return value
    if isinstance(value, str):
        text = value.strip()
        if text.removeprefix("-").isdecimal() and text.isascii():
            return int(text)
    return None


def nanoseconds(path: str, line: int, name: str, value: Any, unit_ns: int) -> int:
    """A time in units of `unit_ns`, exactly (no floats on the way), rounded to whole nanoseconds."""
    whole = _whole(value)
    if whole is not None:
        return whole * unit_ns
    if isinstance(value, str | Decimal):
        try:
            time = Decimal(value)
        except InvalidOperation:
            time = Decimal("nan")
        if time.is_finite() and abs(time.adjusted()) < 30:
            return int((time * unit_ns).to_integral_value())
    raise TraceError(path, line, f"{name} is {str(value)!r:.40}; expected a time")


def json_field(path: str, line: int, row: dict[str, Any], name: str) -> Any:
    """A field that must be there."""
    if name not in row:
        raise TraceError(path, line, f"no field {name!r}; found {', '.join(map(repr, row)) or 'none'}")
    return row[name]


def block_ids(path: str, line: int, value: Any) -> tuple[int, ...]:
    """A list of block ids."""
    if not isinstance(value, list) or any(type(block) is not int for block in value):
        raise TraceError(path, line, f"hash_ids is {str(value)!r:.40}; expected a list of whole numbers")
    return tuple(value)
