"""When each output token was there, from the records alone.

A request's record names the steps that gave it a token: one by one where it ran by itself, and as runs of the decode
group's clock where it ran with the group. The steps' record has when the host had each step's result. Joining the two
is a few array operations on all tokens of a run at once.

A client sees no steps: in its run each chunk of an answer stands for one token, as in `vllm bench serve`, where a chunk
may bring several.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from experiments.records import Run, RunError

Int64 = NDArray[np.int64]

MOVE = 5
"""Numbers of each stay in `moves`."""
COMPLETED = ("stop", "length")
"""Statuses of requests that ended by themselves: those that `vllm bench serve` counts as completed."""


@dataclass(frozen=True)
class TokenTimes:
    """Token times of all requests, one after another, in the order of `run.requests`.

    Attributes:
        offsets: [requests + 1]; request i has the tokens offsets[i]..offsets[i + 1].
        times_ns: [tokens] int64 nanoseconds since the run began, never decreasing within a request.

    In a client's run it is chunks in place of tokens.
    """

    offsets: Int64
    times_ns: Int64

    @property
    def counts(self) -> Int64:
        """[requests]: tokens of each."""
        return np.diff(self.offsets)

    def of(self, row: int) -> Int64:
        """The token times of the request in this row."""
        return self.times_ns[self.offsets[row] : self.offsets[row + 1]]

    def gaps_ns(self, rows: NDArray[np.bool_]) -> Int64:
        """Inter-token latencies of the chosen requests (a mask), pooled."""
        owner = np.repeat(np.arange(len(rows)), self.counts)
        inside = (owner[1:] == owner[:-1]) & rows[owner[1:]]
        return np.diff(self.times_ns)[inside]


_CACHE: WeakKeyDictionary[Run, TokenTimes] = WeakKeyDictionary()


def token_times(run: Run) -> TokenTimes:
    """The time of every output token. Tokens that were discarded, or whose step was never reported, have none.

    Raises RunError where the records contradict each other: a completed request with other than `output_tokens` token
    times, two tokens in one step, times out of order, or a first token at another time than `first_token_ns`.
    """
    if run not in _CACHE:
        _CACHE[run] = _compute(run) if run.has_steps else _chunk_times(run)
    return _CACHE[run]


def _compute(run: Run) -> TokenTimes:
    index = _StepIndex(run.steps)
    requests = run.requests
    stays = _Stays(run)
    keys = np.concatenate([_single_tokens(run, index, stays), _group_tokens(run, index, stays)])
    keys.sort()  # by request, by stay, by step: a step is a slot, and slots of one replica are in order of its steps
    if np.any(keys[1:] == keys[:-1]):
        row = int(keys[1:][keys[1:] == keys[:-1]][0] // (index.size * stays.most))
        raise RunError(f"{run.folder}: request {requests['request_id'].iloc[row]} has two tokens in one step")
    rows, slots = keys // (index.size * stays.most), keys % index.size
    starts = np.searchsorted(rows, np.arange(len(requests) + 1))
    position = np.arange(len(rows)) - starts[rows]
    kept = position < requests["output_tokens"].to_numpy()[rows]
    offsets = np.searchsorted(rows[kept], np.arange(len(requests) + 1))
    times = TokenTimes(offsets, index.end_ns[slots[kept]])
    _check(run, times)
    return times


def _chunk_times(run: Run) -> TokenTimes:
    """When each chunk came, from a client's record."""
    rows = run.table("client")
    place = pd.Index(rows["request_id"].to_numpy()).get_indexer(pd.Index(run.requests["request_id"]))
    if np.any(place < 0):
        row = int(np.argmax(place < 0))
        raise RunError(f"{run.folder}: request {run.requests['request_id'].iloc[row]} has no row in client.parquet")
    lists = rows["chunk_ns"].take(pa.array(place)).combine_chunks()
    offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(lists).to_numpy(zero_copy_only=False))])
    return TokenTimes(offsets.astype(np.int64), pc.list_flatten(lists).to_numpy(zero_copy_only=False).astype(np.int64))


class _StepIndex:
    """Slots: all steps of all replicas numbered through, so that (request, step) fits one integer."""

    def __init__(self, steps: pd.DataFrame) -> None:
        replica, step = steps["replica"].to_numpy(), steps["step"].to_numpy()
        self.replicas = np.unique(replica)
        place = np.searchsorted(self.replicas, replica)
        # The clock of a step in which the group had no member repeats the one before.
        ran = (steps["decode_clock"].to_numpy() > 0) & (steps["num_decodes"].to_numpy() > 0)
        clock = steps["decode_clock"].to_numpy()[ran]
        self._num_steps = _sizes(len(self.replicas), place, step)
        self._num_clocks = _sizes(len(self.replicas), place[ran], clock)
        self._first_slot = np.cumsum(self._num_steps) - self._num_steps
        self._first_clock = np.cumsum(self._num_clocks) - self._num_clocks
        self.size = int(self._num_steps.sum()) + 1
        slot = self._first_slot[place] + step
        self.end_ns = np.full(self.size, -1, np.int64)
        self.end_ns[slot] = steps["end_ns"].to_numpy()
        self._slot_of_clock = np.full(int(self._num_clocks.sum()) + 1, -1, np.int64)
        self._slot_of_clock[self._first_clock[place[ran]] + clock] = slot[ran]

    def place(self, replica: Int64) -> Int64:
        """Position of each replica among those that ran a step, -1 for others."""
        place = np.searchsorted(self.replicas, replica)
        known = np.append(self.replicas, -1)[place] == replica
        return np.where(known, place, -1)

    def slots(self, place: Int64, step: Int64) -> Int64:
        """The slots of steps, -1 where there is no record of them."""
        known = (place >= 0) & (step >= 0) & (step < np.append(self._num_steps, 0)[place])
        slot = np.where(known, np.append(self._first_slot, 0)[place] + step, self.size - 1)
        return np.where(self.end_ns[slot] >= 0, slot, -1)

    def slots_of_clocks(self, place: Int64, clock: Int64) -> Int64:
        """The slots of the group's steps, -1 where there is no record of them."""
        known = (place >= 0) & (clock > 0) & (clock < np.append(self._num_clocks, 0)[place])
        at = np.where(known, np.append(self._first_clock, 0)[place] + clock, len(self._slot_of_clock) - 1)
        return self._slot_of_clock[at]


def _sizes(num_replicas: int, place: Int64, number: Int64) -> Int64:
    """For each replica one more than its largest number."""
    sizes = np.zeros(num_replicas, np.int64)
    np.maximum.at(sizes, place, number + 1)
    return sizes


def _flat(run: Run, column: str) -> tuple[Int64, Int64]:
    """A list column as (values, row of each value)."""
    lists = run.table("requests")[column]
    lengths = pc.list_value_length(lists).to_numpy().astype(np.int64)
    values = pc.list_flatten(lists).cast(pa.int64()).to_numpy()
    return values, np.repeat(np.arange(len(lengths)), lengths)


class _Stays:
    """On which replica each request was when, of its entries in `token_steps` and `decode_runs`, each came about."""

    def __init__(self, run: Run) -> None:
        values, rows = _flat(run, "moves")
        self._last = run.requests["replica"].to_numpy().astype(np.int64)
        self._moved, self._replicas, self._ends = rows[::MOVE], values[::MOVE], (values[3::MOVE], values[4::MOVE])
        counts = np.bincount(self._moved, minlength=len(self._last))
        self._first = np.cumsum(counts) - counts
        self.most = int(counts.max(initial=0)) + 1
        """Stays of the request that has most."""

    def of(self, rows: Int64, nth: Int64, runs: bool) -> tuple[Int64, Int64]:
        """(number of the stay, its replica) for the nth entry of the requests in these rows."""
        stay = np.zeros(len(rows), np.int64)
        for move, end in zip(self._moved, self._ends[runs], strict=True):
            low, high = np.searchsorted(rows, (move, move + 1))  # rows ascend
            stay[low:high] += nth[low:high] >= end
        moves = np.append(np.bincount(self._moved, minlength=len(self._last)), 0)
        earlier = stay < moves[rows]
        at = np.where(earlier, np.append(self._first, 0)[rows] + stay, len(self._replicas))
        return stay, np.where(earlier, np.append(self._replicas, -1)[at], self._last[rows])


def _nth(rows: Int64) -> Int64:
    """Each value's position among those of its row; rows ascend."""
    return np.arange(len(rows)) - np.searchsorted(rows, rows)


def _keys(index: _StepIndex, stays: _Stays, rows: Int64, stay: Int64, slots: Int64) -> Int64:
    return (((rows * stays.most) + stay) * index.size + slots)[slots >= 0]


def _single_tokens(run: Run, index: _StepIndex, stays: _Stays) -> Int64:
    steps, rows = _flat(run, "token_steps")
    stay, replica = stays.of(rows, _nth(rows), runs=False)
    return _keys(index, stays, rows, stay, index.slots(index.place(replica), steps))


def _group_tokens(run: Run, index: _StepIndex, stays: _Stays) -> Int64:
    values, rows = _flat(run, "decode_runs")
    first, last, owner = values[::2], values[1::2], rows[::2]
    if len(first) != len(last) or np.any(owner != rows[1::2]) or np.any(first > last):
        raise RunError(f"{run.folder}: decode_runs of a request are not pairs (a, b) with a <= b")
    lengths = last - first
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    clocks = np.arange(1, total + 1) + np.repeat(first - (ends - lengths), lengths)
    stay, replica = (np.repeat(of_run, lengths) for of_run in stays.of(owner, 2 * _nth(owner), runs=True))
    return _keys(index, stays, np.repeat(owner, lengths), stay, index.slots_of_clocks(index.place(replica), clocks))


def _check(run: Run, times: TokenTimes) -> None:
    requests = run.requests
    ids = requests["request_id"].to_numpy()
    done = requests["status"].isin(COMPLETED).to_numpy()
    expected, found = requests["output_tokens"].to_numpy(), times.counts
    if np.any(done & (expected != found)):
        row = int(np.argmax(done & (expected != found)))
        raise RunError(
            f"{run.folder}: request {ids[row]} ended with {expected[row]} tokens, "
            f"but steps are recorded for {found[row]}"
        )
    owner = np.repeat(np.arange(len(ids)), found)
    backwards = (owner[1:] == owner[:-1]) & (np.diff(times.times_ns) < 0)
    if np.any(backwards):
        row = int(owner[int(np.argmax(backwards))])
        raise RunError(f"{run.folder}: tokens of request {ids[row]} are not in order of time")
    has_token = done & (found > 0)
    first = times.times_ns[times.offsets[:-1][has_token]]
    last = times.times_ns[times.offsets[1:][has_token] - 1]
    recorded = requests["first_token_ns"].to_numpy(np.int64, na_value=-1)[has_token]
    if np.any(first != recorded):
        at = int(np.argmax(first != recorded))
        raise RunError(
            f"{run.folder}: the first token of request {ids[has_token][at]} came at {first[at]} ns by the steps, "
            f"at {recorded[at]} ns by first_token_ns"
        )
    late = last > requests["finish_ns"].to_numpy(np.int64, na_value=-1)[has_token]
    if np.any(late):
        raise RunError(f"{run.folder}: request {ids[has_token][int(np.argmax(late))]} has a token after its end")
