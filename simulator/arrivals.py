"""What comes into a simulation, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from policies.request import Request, State


@dataclass(slots=True)
class Arrival:
    """A request on its way in at `request.arrival_ns`.

    `output_tokens` is its true length: the executor stops it there and no policy sees it. `keys`: hash chain of its
    full blocks, prompt first, as far as they are known; needed only with prefix caching. `end`: how it ends after that
    many tokens; None: `LENGTH` where they are its cap, else `STOPPED`. `hands_off`: another replica takes it over after
    its first token. `timeout_ns`: so long after it came its client gives up, and it is cancelled if it has not ended.
    """

    request: Request
    output_tokens: int
    keys: Sequence[bytes] = ()
    end: State | None = None
    hands_off: bool = False
    timeout_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Cancellation:
    """An end that came from outside, before the plan with index `before_step`: the client went away, or (`STOPPED`,
    after `num_output_tokens`) found a stop string in the text."""

    before_step: int
    end: State = State.CANCELLED
    num_output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Scheduled:
    """When a recorded run handed a request to its control plane: before the plan with index `before_step`."""

    arrival: Arrival
    before_step: int
    cancelled: Cancellation | None = None
