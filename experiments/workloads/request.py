"""The workload: requests as columns, and the transformations that papers apply to them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from experiments.workloads import closed_loop, stats
from experiments.workloads.generators import arrivals, streams
from policies.request import Slo

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]
Cap = int | Literal["largest", "exact"]

NS_PER_S = stats.NS_PER_S
_INT32_COLUMNS = ("prompt_tokens", "output_tokens", "max_tokens", "turn", "priority", "declared_output", "tool")
_INT64_COLUMNS = ("arrival_ns", "session", "program", "gap_ns")
_LIST_COLUMNS = ("tenant", "hash_ids", "texts", "slo", "parents")
_COLUMNS = (*_INT64_COLUMNS, *_INT32_COLUMNS, *_LIST_COLUMNS)
_AT_LEAST = {
    **dict.fromkeys(("prompt_tokens", "output_tokens", "max_tokens", "declared_output"), 1),
    **dict.fromkeys(("arrival_ns", "gap_ns"), 0),
    "tool": -1,
}


@dataclass(frozen=True, eq=False)
class Workload:
    """`n` requests as columns of length `n`, in order of arrival. Immutable; every change is a new workload.

    Attributes:
        arrival_ns: int64 nanoseconds since the run began, >= 0, never decreasing.
        prompt_tokens: int32 prompt length, >= 1.
        output_tokens: int32 TRUE output length, >= 1. For the executor only: no policy may see it.
        max_tokens: int32 cap the client asks for, >= output_tokens. A policy may see it.
        tenant: who pays, one name a request, or None.
        session: int64 conversation number, or None.
        turn: int32 turn within the session from 0, or None.
        priority: int32, or None.
        declared_output: int32 hint of the output length that a policy may see, or None.
        hash_ids: ids of the prompt's blocks of `hash_block` tokens from the first one on, or None.
            Two prompts share a prefix as far as their ids agree. The last id may stand for a partial
            block. A request may have fewer ids than blocks: what follows is its own, shared with nobody.
        hash_block: tokens in one such block (0 without hash_ids).
        texts: real prompts, or None.
        slo: each request's latency objectives, None for one that has none; or None.
        program: int64 number of the job that a call belongs to; None: a session is one.
        parents: row numbers of the requests, all before it, after whose ends a request comes; or None. With them the
            workload is a closed loop, see `closed_loop`.
        gap_ns: int64 time from the end of its last parent to a request's coming, or None (0).
        tool: int32 number of the tool that a call asks for in the end, -1 for one that asks for none; or None.
        name: short name for tables.
        provenance: `source`, `seed`, `steps` (every transformation with its parameters). JSON values only.

    Raises:
        ValueError: no request, a column of the wrong length, or a value out of range.
    """

    arrival_ns: Int64
    prompt_tokens: Int32
    output_tokens: Int32
    max_tokens: Int32
    tenant: list[str] | None = None
    session: Int64 | None = None
    turn: Int32 | None = None
    priority: Int32 | None = None
    declared_output: Int32 | None = None
    hash_ids: list[tuple[int, ...]] | None = None
    hash_block: int = 0
    texts: list[str] | None = None
    slo: list[Slo | None] | None = None
    program: Int64 | None = None
    parents: list[tuple[int, ...]] | None = None
    gap_ns: Int64 | None = None
    tool: Int32 | None = None
    name: str = "workload"
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for column in (*_INT64_COLUMNS, *_INT32_COLUMNS):
            values = getattr(self, column)
            if values is not None:
                dtype = np.int32 if column in _INT32_COLUMNS else np.int64
                object.__setattr__(self, column, _integers(column, values, dtype))
        if self.hash_ids is not None:
            object.__setattr__(self, "hash_ids", [tuple(ids) for ids in self.hash_ids])
        if self.parents is not None:
            object.__setattr__(self, "parents", [tuple(of) for of in self.parents])
        if not len(self.arrival_ns):
            raise ValueError("no request is left; a workload needs at least one")
        for column in _COLUMNS:
            values = getattr(self, column)
            if values is not None and len(values) != len(self.arrival_ns):
                raise ValueError(f"{column} has {len(values)} values, arrival_ns has {len(self.arrival_ns)}")
        self._check_values()

    def _check_values(self) -> None:
        for column, least in _AT_LEAST.items():
            values = getattr(self, column)
            if values is not None and len(values) and values.min() < least:
                row = int(np.argmax(values < least))
                raise ValueError(f"{column} of request {row} is {values[row]}; it must be at least {least}")
        if np.any(np.diff(self.arrival_ns) < 0):
            raise ValueError("arrival_ns must not decrease; sort the requests by arrival first")
        if np.any(self.max_tokens < self.output_tokens):
            row = int(np.argmax(self.max_tokens < self.output_tokens))
            raise ValueError(
                f"request {row} would write {self.output_tokens[row]} tokens past its cap of "
                f"{self.max_tokens[row]}; use with_cap() to cut outputs"
            )
        if self.hash_ids is not None:
            self._check_hash_ids(self.hash_ids)
        if self.parents is not None:
            closed_loop.check_parents(self.parents)

    def _check_hash_ids(self, hash_ids: list[tuple[int, ...]]) -> None:
        if self.hash_block < 1:
            raise ValueError(f"hash_block is {self.hash_block}; hash_ids need a block of at least 1 token")
        count = np.fromiter(map(len, hash_ids), np.int64, len(hash_ids))
        room = -(-self.prompt_tokens.astype(np.int64) // self.hash_block)
        if np.any(count > room):
            row = int(np.argmax(count > room))
            raise ValueError(
                f"request {row} has {count[row]} hash_ids for {self.prompt_tokens[row]} tokens; "
                f"blocks of {self.hash_block} allow at most {room[row]}"
            )

    @classmethod
    def build(
        cls, arrival_ns: ArrayLike, prompt_tokens: ArrayLike, output_tokens: ArrayLike, **columns: Any
    ) -> Workload:
        """A workload from unsorted columns: sorted by arrival (ties keep their order), default cap."""
        arrival = np.asarray(arrival_ns, np.int64)
        if "max_tokens" not in columns:
            outputs = np.asarray(output_tokens)
            columns["max_tokens"] = np.full(len(outputs), outputs.max(initial=1))
        order = np.argsort(arrival, kind="stable")
        columns |= {"arrival_ns": arrival, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
        if not np.array_equal(order, np.arange(len(order))):
            columns = {key: _take(key, value, order) if key in _COLUMNS else value for key, value in columns.items()}
        return cls(**columns)

    def __len__(self) -> int:
        return len(self.arrival_ns)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Workload):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))

    __hash__ = None  # type: ignore[assignment]

    # -- looking ------------------------------------------------------------------------------------------

    @property
    def span_s(self) -> float:
        """Seconds from the first to the last arrival."""
        return int(self.arrival_ns[-1] - self.arrival_ns[0]) / NS_PER_S if len(self) else 0.0

    @property
    def rate(self) -> float:
        """Requests a second (1 / mean gap).

        Raises:
            ValueError: all requests arrive at one instant.
        """
        if self.span_s == 0:
            raise ValueError(f"{self.name}: all requests arrive at one instant, so they have no rate")
        return (len(self) - 1) / self.span_s

    def describe(self) -> dict[str, Any]:
        """Requests, lengths, arrivals and, with hash_ids, the ideal prefix hit rate. See `stats`."""
        described: dict[str, Any] = {
            "name": self.name,
            "requests": len(self),
            "prompt_tokens": stats.length_stats(self.prompt_tokens),
            "output_tokens": stats.length_stats(self.output_tokens),
            **stats.arrival_stats(self.arrival_ns),
        }
        if self.hash_ids is not None:
            described["hash_block"] = self.hash_block
            described["ideal_hit_rate"] = stats.ideal_hit_rate(self.prompt_tokens, self.hash_ids, self.hash_block)
        return described

    # -- taking part of it --------------------------------------------------------------------------------

    def slice(self, n: int) -> Workload:
        """The first `n` requests (all of them if there are fewer). Caps stay as they are."""
        if n < 1:
            raise ValueError(f"n is {n}; a slice needs at least 1 request")
        return self if n >= len(self) else self.take(np.arange(n)).note("slice", n=n)

    def take(self, rows: NDArray[np.intp]) -> Workload:
        """The requests at the given row numbers, which must keep the order of arrival."""
        changed = {column: _take(column, getattr(self, column), rows) for column in _COLUMNS}
        return dataclasses.replace(self, **changed)

    def note(self, step: str, **parameters: Any) -> Workload:
        """The same requests with one more step in the provenance."""
        steps = [*self.provenance.get("steps", []), {"step": step, **parameters}]
        return dataclasses.replace(self, provenance={**self.provenance, "steps": steps})

    def replace(self, **changes: Any) -> Workload:
        """`dataclasses.replace`, for callers that note the step themselves."""
        return dataclasses.replace(self, **changes)

    # -- arrivals -----------------------------------------------------------------------------------------

    def scale_time(self, factor: float) -> Workload:
        """Multiply every arrival time. Keeps the CV; compresses think times too."""
        _check_positive("factor", factor)
        scaled = np.rint(self.arrival_ns * float(factor)).astype(np.int64)
        gaps = None if self.gap_ns is None else np.rint(self.gap_ns * float(factor)).astype(np.int64)
        return self.replace(arrival_ns=scaled, gap_ns=gaps).note("scale_time", factor=factor)

    def scale_rate(self, req_per_s: float) -> Workload:
        """`scale_time` by the factor that gives this rate; in a closed loop roots come so much faster, and nobody
        thinks any faster."""
        _check_positive("req_per_s", req_per_s)
        factor = self.rate / req_per_s
        if self.parents is None:
            return self.scale_time(factor)
        first = np.array([not of for of in self.parents])
        scaled = np.rint(self.arrival_ns[first] * float(factor)).astype(np.int64)
        return closed_loop.with_root_arrivals(self, scaled).note("scale_rate", factor=factor)

    def poisson_arrivals(self, rate: float, seed: int) -> Workload:
        """New arrivals with exponential gaps, `rate` req/s; the first at 0. Order of requests is kept."""
        times = arrivals.poisson(rate, len(self), streams.stream(seed, "arrivals"))
        return self.with_arrivals(times, "poisson_arrivals", rate=rate, seed=seed)

    def with_arrivals(self, seconds: NDArray[np.float64], step: str, **parameters: Any) -> Workload:
        """New arrival times in seconds, sorted, one a request."""
        return self.replace(arrival_ns=arrivals.to_ns(seconds)).note(step, **parameters)

    # -- lengths ------------------------------------------------------------------------------------------

    def scale_lengths(self, factor: float, min: int = 1) -> Workload:
        """Multiply prompt and output lengths, rounded, never below `min`. Caps and hints scale like outputs.

        With hash_ids the block is scaled instead (rounded, at least 1 token) and each prompt keeps its
        number of blocks, so that who shares what with whom stays exactly as it was.
        """
        _check_positive("factor", factor)
        if min < 1:
            raise ValueError(f"min is {min}; a length is at least 1 token")
        declared = self.declared_output
        changes: dict[str, Any] = {
            "output_tokens": _scaled(self.output_tokens, factor, min),
            "max_tokens": _scaled(self.max_tokens, factor, min),
            "declared_output": None if declared is None else _scaled(declared, factor, min),
        }
        if self.hash_ids is None:
            changes["prompt_tokens"] = _scaled(self.prompt_tokens, factor, min)
            return self.replace(**changes).note("scale_lengths", factor=factor, min=min)
        block = max(1, round(self.hash_block * factor))
        before = (self.prompt_tokens.astype(np.int64) - 1) // self.hash_block  # full blocks before the last
        rest = _scaled(self.prompt_tokens - before * self.hash_block, block / self.hash_block, 1)
        prompts = before * block + np.minimum(rest, block)
        changes |= {"prompt_tokens": np.maximum(prompts, np.minimum(min, (before + 1) * block))}
        return self.replace(**changes, hash_block=block).note("scale_lengths", factor=factor, min=min, hash_block=block)

    def cut_prompts(self, limit: int | Int64) -> Workload:
        """Cut prompts to their first `limit` tokens (one number, or one a request, each >= 1)."""
        prompts = np.minimum(self.prompt_tokens, limit)
        ids = self.hash_ids
        if ids is not None:
            room = -(-prompts.astype(np.int64) // self.hash_block)
            ids = [row[:most] for row, most in zip(ids, room.tolist(), strict=True)]
        cut = int(np.sum(prompts < self.prompt_tokens))
        return self.replace(prompt_tokens=prompts, hash_ids=ids).note(
            "cut_prompts", limit=limit if isinstance(limit, int) else "one a request", cut=cut
        )

    def cut_outputs(self, limit: int) -> Workload:
        """Cut outputs and caps to `limit` tokens."""
        if limit < 1:
            raise ValueError(f"limit is {limit}; an output is at least 1 token")
        cut = int(np.sum(self.output_tokens > limit))
        return self.replace(
            output_tokens=np.minimum(self.output_tokens, limit), max_tokens=np.minimum(self.max_tokens, limit)
        ).note("cut_outputs", limit=limit, cut=cut)

    def clip(self, max_model_len: int, how: Literal["cut", "drop"] = "cut") -> Workload:
        """Make every request fit a context of `max_model_len` tokens.

        `cut`: an output longer than `max_model_len - 1` is cut to that; then a prompt is cut (its end goes)
        to `max_model_len - output_tokens`. This is Vidur's rule: the prompt gives way. `drop`: requests
        that do not fit are left out. In both, caps are then lowered to `max_model_len - prompt_tokens`, as
        a server demands; for a request whose prompt was cut the cap so becomes its true length.
        """
        if max_model_len < 2:
            raise ValueError(f"max_model_len is {max_model_len}; a prompt and an output need at least 2")
        total = self.prompt_tokens.astype(np.int64) + self.output_tokens
        too_long = int(np.sum(total > max_model_len))
        if how == "drop":
            fitted = self.take(np.flatnonzero(total <= max_model_len))
        else:
            fitted = self.cut_outputs(max_model_len - 1)
            fitted = fitted.cut_prompts(max_model_len - fitted.output_tokens.astype(np.int64))
        caps = np.minimum(fitted.max_tokens, max_model_len - fitted.prompt_tokens)
        kept = fitted.replace(max_tokens=caps, provenance=self.provenance)
        return kept.note("clip", max_model_len=max_model_len, how=how, too_long=too_long)

    def with_cap(self, cap: Cap = "largest") -> Workload:
        """Set max_tokens.

        `largest`: the largest output of the workload for everyone, as a service-wide cap would be. `exact`:
        each request's own true length (this tells a policy the answer: label such a run). A number: that
        for everyone; outputs beyond it are cut, because a server would stop there.
        """
        if isinstance(cap, int):
            if cap < 1:
                raise ValueError(f"cap is {cap}; it must be at least 1 token")
            cut = int(np.sum(self.output_tokens > cap))
            outputs = np.minimum(self.output_tokens, cap)
            return self.replace(output_tokens=outputs, max_tokens=np.full(len(self), cap)).note(
                "with_cap", cap=cap, cut=cut
            )
        if cap not in ("largest", "exact"):
            raise ValueError(f"cap is {cap!r}; it must be 'largest', 'exact' or a number of tokens")
        largest = np.full(len(self), self.output_tokens.max(initial=1))
        return self.replace(max_tokens=self.output_tokens if cap == "exact" else largest).note("with_cap", cap=cap)

    def with_declared_output(self, sigma: float, seed: int) -> Workload:
        """Give each request a length hint: the true length times a lognormal error of `sigma` (0: exact)."""
        if not 0 <= sigma < float("inf"):
            raise ValueError(f"sigma is {sigma}; it must be 0 or more, and finite")
        error = streams.stream(seed, "declared").lognormal(0.0, sigma, len(self))
        hints = np.minimum(np.maximum(np.rint(self.output_tokens * error), 1), np.iinfo(np.int32).max)
        return self.replace(declared_output=hints.astype(np.int64)).note("with_declared_output", sigma=sigma, seed=seed)

    # -- files --------------------------------------------------------------------------------------------

    def to_jsonl(self, path: str | Path) -> None:
        """Write our own format; `from_jsonl` gives an equal workload back. See `jsonl`."""
        from experiments.workloads.jsonl import write_jsonl

        write_jsonl(self, path)

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Workload:
        """Read our own format. See `jsonl`.

        Raises:
            TraceError: a line that is not in the format.
        """
        from experiments.workloads.jsonl import read_jsonl

        return read_jsonl(path)


def _integers(name: str, values: ArrayLike, dtype: Any) -> NDArray[Any]:
    """A read-only copy of `dtype`, refusing fractions and overflow."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one column, not {array.ndim} dimensions")
    if len(array) and array.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold whole numbers, not {array.dtype}")
    limits = np.iinfo(dtype)
    if len(array) and (array.min() < limits.min or array.max() > limits.max):
        raise ValueError(f"{name} has values outside {limits.min}..{limits.max}")
    column = array.astype(dtype)
    column.flags.writeable = False
    return column


def _take(column: str, values: Any, rows: NDArray[np.intp]) -> Any:
    if values is None:
        return None
    if column == "parents":
        return closed_loop.renumbered(values, rows)
    return [values[row] for row in rows.tolist()] if isinstance(values, list) else np.asarray(values)[rows]


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    return type(left) is type(right) and bool(left == right)


def _scaled(tokens: NDArray[Any], factor: float, least: int) -> Int64:
    return np.maximum(np.rint(tokens * factor), least).astype(np.int64)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}; it must be positive and finite")
