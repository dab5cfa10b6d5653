"""What the HTTP handlers know of an engine: prompts go in, outputs come back to the call that waits for them.

`EngineProxy` is one engine, at the other end of a link, `Coordinator` several of them behind one face.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from runtime.engine_stats import EngineStats
from runtime.sampling.params import SamplingParams
from runtime.sequence import Details
from runtime.serving.messages import EngineInfo, TokenOutput


class EngineStartError(RuntimeError):
    """The engine did not start; the message is one line that says why."""


class EngineGone(RuntimeError):
    """No engine takes this: it has died, or the server is shutting down, or all are told to take nothing.

    retry_after: seconds after which trying again may help, if it may.
    """

    def __init__(self, reason: str, retry_after: int | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class CommandFailed(ValueError):
    """An operator's command was refused by the engine; nothing has changed."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in tokens, with how it is sampled; `params.stop` is the front's own affair and not sent."""

    token_ids: list[int]
    params: SamplingParams
    details: Details


class Sink(Protocol):
    """Takes the outputs of a prompt's requests, in the order in which they come."""

    def put(self, received_at: float, output: TokenOutput) -> None: ...
    def fail(self, error: BaseException) -> None: ...


class Call:
    """The requests of one HTTP request, and their outputs as they come: `await next()` takes all that is there."""

    def __init__(self) -> None:
        self.request_ids: list[int] = []
        """Of every continuation of every prompt, in order."""
        self._arrived: list[tuple[float, TokenOutput]] = []
        self._failure: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def next(self) -> list[tuple[float, TokenOutput]]:
        """(when it was received, output), at least one. Raises what the call has failed with, if it has."""
        if not self._arrived and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._arrived:
            arrived, self._arrived = self._arrived, []
            return arrived
        assert self._failure is not None
        raise self._failure

    def put(self, received_at: float, output: TokenOutput) -> None:
        """An output for one of the requests. Who waits is woken once all outputs of the step have been put."""
        self._arrived.append((received_at, output))
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Nothing more comes. What has arrived can still be taken."""
        self._failure = self._failure or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(frozen=True, slots=True)
class EngineView:
    """One engine behind a client, for metrics and settings. `state`: `serving`, `draining` or `dead`."""

    id: int
    info: EngineInfo
    stats: EngineStats
    state: str
    error: str | None


class EngineClient(ABC):
    """What serves token ids: requests go in, outputs come back to their `Call`."""

    @property
    @abstractmethod
    def info(self) -> EngineInfo:
        """Of the engine; where there are several, what they have in common, and of the rest the first one's."""

    @property
    @abstractmethod
    def engines(self) -> Sequence[EngineView]:
        """Each engine, with its counters as of its last step."""

    @property
    @abstractmethod
    def error(self) -> str | None:
        """Why nothing is served any more; None while all is well."""

    @property
    @abstractmethod
    def num_queued(self) -> tuple[int, int]:
        """Requests that wait for their first token, and the prompt tokens of these."""

    @property
    @abstractmethod
    def num_live(self) -> int:
        """Requests that have not ended."""

    @abstractmethod
    def submit(self, prompts: Sequence[Prompt]) -> Call:
        """Hand in prompts, each with its `params.n` continuations. Raises EngineGone."""

    @abstractmethod
    def cancel(self, call: Call) -> None:
        """Nobody waits for these requests any more."""

    @abstractmethod
    def stop(self, request_id: int, num_output_tokens: int) -> None:
        """This request's text has ended; it gets no more outputs."""

    @abstractmethod
    def fail_all(self, reason: str) -> None:
        """End every call with EngineGone."""

    @abstractmethod
    async def command(self, name: str, arguments: dict[str, Any]) -> Any:
        """Have an operator's command carried out. Raises CommandFailed or EngineGone."""

    @abstractmethod
    async def close(self) -> None:
        """End everything; who still waits gets EngineGone. A second call does nothing."""
