"""The columns of a run's records: one definition for the rows that the control plane emits and the files they end in.

Times are integer nanoseconds since the run began.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

Times = tuple[int, int, int, int]
"""Of a step: planned, launched, ended, and for so long on the device."""

REQUESTS: dict[str, str] = {
    "request_id": "int64",
    "replica": "int32",
    "arrival_ns": "int64",  # stamped on the way in
    "before_step": "int64",  # handed to the control plane before the plan with this index
    "tenant": "string",
    "session": "int64?",
    "program": "int64?",
    "parents": "list<int64>",
    "priority": "int32",
    "slo_ttft_ns": "int64?",
    "slo_tpot_ns": "int64?",
    "slo_e2e_ns": "int64?",
    "slo_value": "float64?",  # null where the request has no SLO
    "slo_droppable": "bool",
    "hints": "map<string,float64>",  # declared or predicted: "output_tokens", ...
    "prompt_tokens": "int32",
    "max_tokens": "int32",  # the client's cap, within the model's limit
    "output_tokens": "int32",
    "cached_tokens": "int32",  # prefix hit at the first admission
    "preemptions": "int32",
    "first_scheduled_ns": "int64?",
    "first_token_ns": "int64?",
    "finish_ns": "int64?",
    "end_before_step": "int64?",  # ended before the plan with this index: cancelled, or stopped by a text; see below
    "status": "string",  # stop, length, cancelled, dropped, refused, unfinished
    "error": "string",
    "token_steps": "list<int64>",  # steps that produced a token of it, where it did not run with the decode group
    "decode_runs": "list<int64>",  # pairs (a, b): a token in each step with a < decode_clock <= b of the group
    "block_keys": "list<binary>",  # hash chain of its full blocks, with prefix caching
    "moves": "list<int64>",  # its stays on other replicas before the last one, five numbers each
    "fetched_tokens": "int32",  # of `cached_tokens`, those that came from host memory
    "disk_tokens": "int32",  # of `fetched_tokens`, those that were read from disk for it before
}
"""requests.parquet, one row a request, when it ends: all that a policy was told of it, and what became of it.

Tokens beyond `output_tokens` in the last run were discarded. `replica`, `before_step` and `end_before_step` are those
of the last replica that had it. An earlier stay in `moves`: its replica, the plans before which it came and left, and
how many entries of `token_steps` and `decode_runs` there are up to its end. One that ends between two stays, on its way
to another replica or taken back and not running again yet, is none of those that a replica counts as alive: its
`end_before_step` is the plan before which it left."""

STEPS: dict[str, str] = {
    "replica": "int32",
    "step": "int64",  # index of the call of plan(); calls that planned nothing have no tokens
    "plan_ns": "int64",
    "launch_ns": "int64",  # handed to the device
    "end_ns": "int64",  # the host had the result
    "device_ns": "int64",
    "num_decodes": "int32",
    "decode_context": "int64",
    "max_context": "int32",
    "num_chunks": "int32",
    "chunk_tokens": "int32",
    "chunk_pairs": "int64",
    "chunk_context": "int64",
    "chunk_squares": "int64",
    "num_samples": "int32",
    "padded_tokens": "int32",
    "graph": "bool",
    "decode_clock": "int64",  # steps so far in which the decode group ran; 0 in a step where it did not
    "num_admitted": "int32",
    "num_preempted": "int32",
    "num_finished": "int32",
    "free_blocks": "int32",  # neither held nor cached
    "idle_blocks": "int32",  # cached, held by nobody
    "num_running": "int32",
    "num_waiting": "int32",
    "num_paused": "int32",  # preempted, with their blocks kept
    "wake_ns": "int64?",
    "swapped_out": "int32",  # KV copied to host memory before the step, in tokens: whole blocks
    "swapped_in": "int32",  # the same, from host memory
    "num_swapped": "int32",  # preempted, with their blocks in host memory
    "free_host_blocks": "int32",  # neither a swapped request's nor cached
    "offloaded": "int32",  # of `swapped_out`, what is kept of cached prefixes
    "fetched": "int32",  # of `swapped_in`, what was fetched of them
    "idle_host_blocks": "int32",  # hold a cached prefix
    "copy_out_ns": "int64",  # how long its copies took, of each direction for itself
    "copy_in_ns": "int64",
    "copy_wait_ns": "int64",  # for so much of that its computation waited; the rest is hidden
    "disk_out": "int32",  # KV on its way from host memory to disk from this step on, in tokens: whole blocks
    "disk_in": "int32",  # the same, from disk to host memory
    "disk_blocks": "int32",  # on disk, or on their way there: of cached prefixes
    "disk_dropped": "int32",  # blocks lost since the last plan: not written, too late, or not as they were
    "num_named": "int32",
    "named_blocks": "int32",
    "looked_up_blocks": "int32",
}
"""steps.parquet, one row a call of plan(), steps counted from 0 on each replica.

Sizes are as in `policies.shapes.StepShape`; blocks and queues as they are after the plan.
"""

ALIVE = ("num_running", "num_waiting", "num_paused", "num_swapped")
"""The columns of steps.parquet that together count the requests alive."""

ADDED: dict[str, dict[str, object]] = {
    "requests": {"moves": [], "fetched_tokens": 0, "disk_tokens": 0},
    "steps": {
        "chunk_squares": 0,
        "swapped_out": 0,
        "swapped_in": 0,
        "num_swapped": 0,
        "free_host_blocks": 0,
        "offloaded": 0,
        "fetched": 0,
        "idle_host_blocks": 0,
        "copy_out_ns": 0,
        "copy_in_ns": 0,
        "copy_wait_ns": 0,
        "disk_out": 0,
        "disk_in": 0,
        "disk_blocks": 0,
        "disk_dropped": 0,
        "num_named": 0,
        "named_blocks": 0,
        "looked_up_blocks": 0,
    },
}
"""Table -> columns that runs of earlier versions lack, and what those would have had there; of `chunk_squares`, what a
reader works out from the decisions."""

REPLICAS: dict[str, str] = {
    "time_ns": "int64",
    "replica": "int32",
    "pool": "string",
    "event": "string",
}
"""replicas.parquet, in runs whose replicas differ or come and go: one row for each change of a replica.

Events: `start` (asked for by an autoscaler), `serve` (it takes requests; the first row of those that are there from the
start on), `drain` (it takes no more), `stop` (it has finished what it had, or was told to go before it had started),
`fail`.
"""

DECISIONS: dict[str, str] = {
    "replica": "int32",
    "step": "int64",
    "request_id": "int64",  # -1: the decode group
    "kind": "string",
    "tokens": "int64",
    "reason": "string",
}
"""decisions.parquet, one row a decision.

Kinds: `admit` (tokens: prefix hit), `chunk`, `decode` (one request, or the group with the number of its members),
`join` and `leave` (the group), `capped` (its last token with the group), `preempt` (reason: the mode; `swap` moves its
blocks to host memory), `resume` (from a pause, or from host memory), `drop`, `refused`, and `blocked` (a waiting
request was looked at and passed over; written when the reason changes; whoever waits and has no row of its own is
behind the blocked one). Together they say for each step which request ran with how many tokens.

`export`, `hand_over`, `take_back`, `reserve`, `take_in`, `unreserve`, `lend`, `borrow`: what `policies.transfers` did
for a request before a step, with tokens, or for `reserve`, `lend` and `borrow` blocks (those to be moved).

What an operator did before a step stands first among its decisions, with request -1: `swap` (reason: roles and their
new policies), `hold` (plans run nothing from here on), `release`, and `flush` (tokens: cached blocks forgotten). So
does `disk`: a block has come to disk or from there (tokens: the number of its copy), or has not (reason: why).
"""


Row = tuple[object, ...]


class DecodeSteps(NamedTuple):
    """The rows of steps in a row in which the same requests decode and nothing else happens, as one; but for a chunk of
    one prefill, as long in each of them.

    They are like `first`, the whole row of the first one, but each has one token more of every decode, the chunk goes
    on, and times and unused blocks are each one's own. `longest`: the longest decode's context in the first one. A
    recorder that has a method `decode_steps` is given them like this.
    """

    first: Row
    times: Sequence[Times]
    unused: Sequence[int]
    longest: int
    request_id: int  # of the chunk; -1 without

    def growth(self) -> list[tuple[int, int]]:
        """(column of steps.parquet, by how much it grows from step to step)."""
        decodes, tokens = self.first[_AT["num_decodes"]], self.first[_AT["chunk_tokens"]]
        assert isinstance(decodes, int)
        assert isinstance(tokens, int)
        grown = {"step": 1, "decode_clock": 1, "decode_context": decodes}
        if tokens:
            grown |= {"chunk_context": tokens, "chunk_pairs": tokens * tokens}
        return [(_AT[name], more) for name, more in grown.items()]

    def without(self, count: int) -> DecodeSteps:
        """All but so many leading ones; one is left at least."""
        row: list[Any] = list(self.first)
        for column, more in self.growth():
            row[column] += count * more
        times, unused, longest = self.times[count:], self.unused[count:], self.longest + count
        row[_TIMES], row[_AT["free_blocks"]] = times[0], unused[0]
        row[_AT["max_context"]] = max(longest, row[_AT["chunk_context"]])
        return DecodeSteps(tuple(row), times, unused, longest, self.request_id)

    def step_rows(self) -> Iterator[Row]:
        """The rows of steps.parquet, one by one."""
        for i in range(len(self.times)):
            yield self.without(i).first

    def decision_rows(self, later: int = 0) -> list[Row]:
        """The rows of decisions.parquet of the first step, or of one that comes so many steps later."""
        first = self.first
        step, decodes, tokens = first[_STEP] + later, first[_DECODES], first[_TOKENS]  # type: ignore[operator]
        rows: list[Row] = [(first[0], step, -1, "decode", decodes, "")]
        if tokens:
            rows.append((first[0], step, self.request_id, "chunk", tokens, ""))
        return rows


_AT = {name: i for i, name in enumerate(STEPS)}
_TIMES = slice(_AT["plan_ns"], _AT["device_ns"] + 1)
_STEP, _DECODES, _TOKENS = _AT["step"], _AT["num_decodes"], _AT["chunk_tokens"]
