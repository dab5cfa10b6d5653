"""The twin of a live server: a simulation with its policies, its limits and a cost model, fed with what it tells."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.live.server import About, Event, LiveError, Page
from policies import registry
from policies.prefix import KEY_BYTES
from policies.records import REQUESTS, STEPS
from policies.replica_state import Limits
from policies.request import Request, Slo
from policies.stack import StackSpec
from simulator.arrivals import Arrival
from simulator.costs.base import CostModel
from simulator.fed import FedSimulation

KEEP_STEPS = 400_000
EVENTS_AT_ONCE = 256
_STEP = {name: place for place, name in enumerate(STEPS)}
_REQUEST = {name: place for place, name in enumerate(REQUESTS)}
STATE = ("plan_ns", "replica", "num_running", "num_waiting", "free_blocks", "idle_blocks", "end_ns", "num_samples")
_KEPT = tuple(_STEP[name] for name in STATE)


class Twin:
    """Simulated replicas, on the server's clock.

    Args:
        about: what the server says of itself; its first engine's limits count for all.
        stack, router: its policies as they are now.
        replicas: how many take requests.

    Raises LiveError where there can be no twin.
    """

    def __init__(
        self, about: About, stack: dict[str, str], router: str | None, replicas: int, costs: CostModel
    ) -> None:
        self.limits = about.engines[0].checked_limits()
        self._recorder = _Recorder()
        try:
            stacks, routing = _policies(stack, router, self.limits, replicas, costs)
            self._simulation = FedSimulation(self.limits, stacks, costs, routing, recorder=self._recorder)
        except (ValueError, TypeError) as error:
            raise LiveError(f"there is no twin of this server: {' '.join(str(error).split())}") from None
        self._fed: set[int] = set()
        self._reached_ns = 0
        self.catching_up = False
        """Whether it was out of its budget of computing before anything else stopped it."""

    @property
    def now_ns(self) -> int:
        """How far it has come, on the server's clock."""
        return self._reached_ns

    @property
    def held(self) -> bool:
        """Whether it waits for the server to get further with a request."""
        return self._simulation.held

    def arrives(self, event: Event) -> None:
        """A request has come to the server."""
        request = Request(
            event.id,
            event.at_ns,
            event.prompt_tokens,
            event.max_tokens,
            event.tenant,
            event.session,
            priority=event.priority,
            slo=_slo(event.slo),
        )
        self._fed.add(event.id)
        self._simulation.feed(Arrival(request, event.max_tokens, _split(event.keys)), known=event.forced)

    def ends(self, event: Event) -> None:
        """It has ended there."""
        if event.id not in self._fed:
            return
        self._fed.discard(event.id)
        if event.reason in ("stop", "length"):
            self._simulation.ended(event.id, max(1, event.output_tokens))
        else:
            self._simulation.cancelled(event.id, max(event.at_ns, self._simulation.now_ns))

    def stands(self, page: Page) -> None:
        """How far the requests are that have not ended."""
        for request_id, tokens in page.alive:
            self._simulation.reached(request_id, tokens)

    def advance(self, until_ns: int, budget_s: float) -> None:
        """Go on to a time, as far as what is known and `budget_s` seconds of this thread's time allow."""
        deadline = time.thread_time() + budget_s
        while not (done := self._simulation.advance(until_ns, EVENTS_AT_ONCE)):
            if time.thread_time() > deadline:
                break
        self.catching_up = not done
        standing = self._simulation.held or not done
        self._reached_ns = max(self._reached_ns, self._simulation.now_ns if standing else until_ns)

    def take_ended(self) -> list[tuple[int, int | None, int | None, int, str]]:
        """Requests that have ended since the last call: (id, first token ns, end ns, output tokens, status)."""
        ended, self._recorder.ended = self._recorder.ended, []
        return ended

    def steps(self) -> dict[str, NDArray[np.int64]]:
        """The newest steps, in order of their plans: the columns `STATE`."""
        rows = np.array(self._recorder.steps, np.int64).reshape(-1, len(STATE))
        return {name: rows[:, place] for place, name in enumerate(STATE)}


class _Recorder:
    """Keeps what the page shows."""

    def __init__(self) -> None:
        self.steps: deque[tuple[Any, ...]] = deque(maxlen=KEEP_STEPS)
        self.ended: list[tuple[int, int | None, int | None, int, str]] = []

    def request(self, row: tuple[Any, ...]) -> None:
        wanted = ("request_id", "first_token_ns", "finish_ns", "output_tokens", "status")
        self.ended.append(tuple(row[_REQUEST[name]] for name in wanted))  # type: ignore[arg-type]

    def step(self, row: tuple[Any, ...]) -> None:
        self.steps.append(tuple([row[place] for place in _KEPT]))

    def decision(self, row: tuple[Any, ...]) -> None:
        """Nobody looks at them."""


def _policies(
    stack: dict[str, str], router: str | None, limits: Limits, replicas: int, costs: CostModel
) -> tuple[list[Any], Any]:
    # Nothing is imported because a server says so.
    foreign = [text for text in (*stack.values(), router or "") if ":" in text]
    if foreign:
        raise LiveError(f"its policy {foreign[0]} is not one of those that come with Diptych")
    spec = StackSpec(**stack)
    stacks = [spec.build(block_size=limits.block_size) for _ in range(replicas)]
    if replicas == 1:
        return stacks, None
    name = router or "round_robin"
    return stacks, registry.make("router", name, seed=0, block_size=limits.block_size, cost=costs, transfer=None)


def _slo(fields: dict[str, Any] | None) -> Slo | None:
    try:
        return None if fields is None else Slo(**fields)
    except TypeError:
        raise LiveError(f"the server tells of objectives that this version does not know: {fields}") from None


def _split(keys: str | None) -> list[bytes]:
    """The names of a prompt's blocks; none where they are not known."""
    try:
        joined = bytes.fromhex(keys or "")
    except ValueError:
        raise LiveError("the server tells of block names that are none") from None
    return [joined[at : at + KEY_BYTES] for at in range(0, len(joined), KEY_BYTES)]
