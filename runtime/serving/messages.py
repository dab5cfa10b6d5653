"""What passes between the front and an engine process: msgspec structs in MessagePack, one message a frame.

To the engine: `Submit`, `Cancel`, `Stop`, `Admin`, `Ping`, `Shutdown`. From it: `Ready` or `Failed` once, then one
`StepOutputs` a step, `AdminReply`s, `Pong`s, and `Stopped` at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from policies.replica_state import Limits
from runtime.engine_stats import EngineStats
from runtime.sampling.params import SamplingParams
from runtime.sequence import Details, TokenLogprobs


class Submit(msgspec.Struct, tag="submit", array_like=True, frozen=True):
    """`params.n` continuations of one prompt, with the request ids `first_id`, `first_id + 1`, ..."""

    first_id: int
    token_ids: list[int]
    params: SamplingParams
    details: Details


class Cancel(msgspec.Struct, tag="cancel", array_like=True, frozen=True):
    """The client of these requests has gone away."""

    request_ids: list[int]


class Stop(msgspec.Struct, tag="stop", array_like=True, frozen=True):
    """The text of this request has come to a stop string with its `num_output_tokens`-th token."""

    request_id: int
    num_output_tokens: int


class Admin(msgspec.Struct, tag="admin", array_like=True, frozen=True):
    """A command of an operator, by name (`runtime.serving.commands`); answered by an `AdminReply`."""

    call_id: int
    command: str
    arguments: dict[str, Any]


class Ping(msgspec.Struct, tag="ping", array_like=True, frozen=True):
    """Asks for a sign of life, and is one (`runtime.serving.heartbeat`); answered by a `Pong`."""


class Shutdown(msgspec.Struct, tag="shutdown", array_like=True, frozen=True):
    """Stop after the step in flight. Whoever has not ended gets an error."""


class TokenOutput(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What one step adds to one request: `runtime.sequence.Output` without text."""

    request_id: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the front is told of an engine that is ready. `cost`: the cost model that its policies plan by, if any."""

    model: str
    vocab_size: int
    limits: Limits
    stack: dict[str, str]
    startup_seconds: dict[str, float]
    device: str
    dtype: str
    pid: int
    record_folder: str | None = None
    cost: dict[str, Any] | None = None


class Ready(msgspec.Struct, tag="ready", array_like=True, frozen=True):
    """The engine takes requests."""

    info: EngineInfo


class Failed(msgspec.Struct, tag="failed", array_like=True, frozen=True):
    """The engine could not be started; `reason` is one line that says what to do."""

    reason: str


class StepOutputs(msgspec.Struct, tag="outputs", array_like=True, frozen=True):
    """All that one step adds to all requests, and the engine's counters after it."""

    outputs: list[TokenOutput]
    stats: EngineStats


class AdminReply(msgspec.Struct, tag="reply", array_like=True, frozen=True):
    """The result of a command, or why there is none."""

    call_id: int
    result: Any = None
    error: str | None = None


class Pong(msgspec.Struct, tag="pong", array_like=True, frozen=True):
    """A sign of life."""


class Stopped(msgspec.Struct, tag="stopped", array_like=True, frozen=True):
    """The engine has stopped; every request has had its last output."""

    reason: str


ToEngine = Submit | Cancel | Stop | Admin | Ping | Shutdown
FromEngine = Ready | Failed | StepOutputs | AdminReply | Pong | Stopped

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
