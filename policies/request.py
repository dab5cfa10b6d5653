"""What a policy sees of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from policies.decode_group import DecodeGroup


class State(Enum):
    """Where a request is in its life. The last five are ends."""

    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"  # preempted with its KV cache kept on the device
    SWAPPED = "swapped"  # preempted with its KV cache moved to host memory
    MOVING = "moving"  # stopped, for its KV cache to go to another replica
    STOPPED = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the model's limit
    CANCELLED = "cancelled"
    DROPPED = "dropped"  # shed by a policy
    REFUSED = "refused"  # could never be served

    ended: bool


def found_directly(enumeration: type[Enum]) -> None:
    """Have Python 3.11 find members like any attribute of a class, as 3.12 does: by a property it takes ten times as
    long, and every step names a dozen."""
    for member in enumeration:
        type.__setattr__(enumeration, member.name, member)


found_directly(State)
for _state in State:
    _state.ended = _state.value not in ("waiting", "running", "paused", "swapped", "moving")


@dataclass(frozen=True, slots=True)
class Slo:
    """A request's latency objectives, in nanoseconds. `droppable`: it may be shed once they cannot be met."""

    ttft_ns: int | None = None
    tpot_ns: int | None = None
    e2e_ns: int | None = None
    value: float = 1.0
    droppable: bool = False


@dataclass(slots=True, eq=False)
class Request:
    """One request. Policies read it; the control plane alone writes it.

    There is no prefill phase and no decode phase (vLLM v1's rule): a request has `num_tokens`, of which
    `num_computed_tokens` have their KV cache written or being written, and a step hands out some of the
    difference. What a policy never learns is how long the output will be: `max_tokens` is the client's cap.

    `eq=False`: a request is itself, so it can be a key; orders use `key`.
    """

    id: int
    arrival_ns: int
    num_prompt_tokens: int
    max_tokens: int
    tenant: str = ""
    session: int | None = None
    program: int | None = None  # a group of calls that make one job, as an agent's
    parents: tuple[int, ...] = ()
    priority: int = 0  # lower goes first
    slo: Slo | None = None
    hints: Mapping[str, float] = field(default_factory=dict)  # declared or predicted: "output_tokens", ...

    # Written by the control plane.
    state: State = State.WAITING
    num_preemptions: int = 0
    num_cached_tokens: int = 0  # prefix hit at the first admission
    num_fetched_tokens: int = 0  # those of them that came from host memory
    num_disk_tokens: int = 0  # those of them that were read from disk for it before
    first_scheduled_ns: int | None = None
    first_token_ns: int | None = None
    finish_ns: int | None = None

    # Behind the view. While the request is in the decode group both counts are kept relative to its clock, so that
    # a step in which everyone decodes touches no request.
    _computed: int = 0
    _tokens: int = 0
    _group: DecodeGroup | None = None
    _blocks: list[int] = field(default_factory=list)
    _host_blocks: list[int] = field(default_factory=list)
    _keys: list[bytes] = field(default_factory=list)
    _reads: dict[bytes, int] | None = None  # key -> number of the read from disk that it has asked for, once it has
    _num_registered: int = 0  # leading blocks that stand in the prefix index under this request's keys
    _busy_until: int = -1  # last step that may still be writing for it
    _token_steps: list[int] = field(default_factory=list)
    _decode_runs: list[int] = field(default_factory=list)
    _tokens_elsewhere: int = 0  # output tokens that it may have once it has left this replica
    _moves: list[int] = field(default_factory=list)  # its stays before this one, as in the column `moves`

    def __post_init__(self) -> None:
        self._tokens = self.num_prompt_tokens

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose KV cache is written, or is being written by a step in flight."""
        group = self._group
        return self._computed if group is None else self._computed + group.clock

    @property
    def num_tokens(self) -> int:
        """Prompt tokens and output tokens, those that a step in flight is about to sample included."""
        group = self._group
        return self._tokens if group is None else self._tokens + group.clock

    @property
    def num_pending_tokens(self) -> int:
        """Tokens still to compute: 1 for a request that decodes, more for a prefill."""
        return self._tokens - self._computed

    @property
    def num_output_tokens(self) -> int:
        """Output tokens sampled so far, those of a step in flight included."""
        group = self._group  # not by `num_tokens`: asked for of every request in every step
        tokens = self._tokens if group is None else self._tokens + group.clock
        return tokens - self.num_prompt_tokens

    @property
    def num_blocks(self) -> int:
        """KV blocks held on the device."""
        return len(self._blocks)

    @property
    def num_host_blocks(self) -> int:
        """Blocks held in host memory: those of a swapped request."""
        return len(self._host_blocks)

    @property
    def gone(self) -> bool:
        """Whether it is none of this replica's requests any more: it has ended, or leaves for another replica."""
        return self.state is State.MOVING or self.state.ended

    @property
    def hands_off(self) -> bool:
        """Whether another replica takes it over once it has its first token. Until then its `max_tokens` is 1."""
        return self._tokens_elsewhere > 0

    @property
    def max_tokens_in_all(self) -> int:
        """Output tokens that it may have, on all replicas together."""
        return self.max_tokens + self._tokens_elsewhere

    @property
    def key(self) -> tuple[int, int]:
        """The order in which every tie ends: (arrival, id)."""
        return (self.arrival_ns, self.id)

    def __repr__(self) -> str:
        return (
            f"Request({self.id}, {self.state.value}, prompt={self.num_prompt_tokens}, "
            f"computed={self.num_computed_tokens}/{self.num_tokens})"
        )
