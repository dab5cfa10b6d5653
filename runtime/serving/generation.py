"""What one HTTP request asked for, as it comes into being: outputs of the engine in, pieces of text out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from runtime.detokenizer import IncrementalDetokenizer
from runtime.sampling.params import SamplingParams
from runtime.sampling.stop import StopReason, text_token_ids
from runtime.sequence import TokenLogprobs
from runtime.serving.engine_client import Call, EngineClient, EngineGone, Prompt
from runtime.serving.errors import ApiError
from runtime.serving.messages import TokenOutput
from runtime.serving.text import TextCodec


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new about one choice. `finish_reason`: OpenAI's `stop` or `length`, with the last piece."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(slots=True)
class Choice:
    """One continuation of one prompt, as far as it has come."""

    index: int
    params: SamplingParams
    detokenizer: IncrementalDetokenizer
    num_tokens: int = 0
    num_cached_tokens: int = 0
    finished: bool = False

    def take(self, output: TokenOutput) -> Delta:
        """The next output of the engine as text. A stop string ends the choice here, whatever the engine does."""
        self.num_tokens += len(output.token_ids)
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        reason = None
        if output.finish_reason in ("stop", "length"):
            reason = StopReason("length" if output.finish_reason == "length" else "stop", output.stop_reason)
        text = self.detokenizer.push(text_token_ids(output.token_ids, reason, self.params))
        if self.detokenizer.finished_by is not None:
            reason = StopReason("stop", self.detokenizer.finished_by)
        elif reason is not None:
            text += self.detokenizer.flush()
        self.finished = reason is not None
        return Delta(
            self.index,
            text,
            output.token_ids,
            output.logprobs,
            None if reason is None else reason.kind,
            None if reason is None else reason.detail,
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole answer: of all prompts, of all choices, and of the prompts' those found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def as_dict(self) -> dict[str, object]:
        """As in OpenAI's answers."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Observer(Protocol):
    """Hears of what a generation goes through, for the metrics. Times are seconds of `time.monotonic`."""

    def token(self, request_id: int, at: float, num_tokens: int) -> None: ...
    def ended(self, request_id: int, at: float, reason: str) -> None: ...


@dataclass(slots=True)
class Generation:
    """All choices of one HTTP request, of one prompt or several. `await next()` until `finished`."""

    client: EngineClient
    prompts: Sequence[Prompt]
    choices: list[Choice]
    call: Call
    observer: Observer
    created: float = field(default_factory=time.time)
    """Seconds since 1970."""
    _of_request: dict[int, Choice] = field(default_factory=dict)
    _num_unfinished: int = 0
    _num_tokens: int = 0
    _first_choices: list[Choice] = field(default_factory=list)  # of each prompt: they say what was cached of it
    _abandoned: bool = False

    @classmethod
    def start(cls, client: EngineClient, codec: TextCodec, prompts: Sequence[Prompt], observer: Observer) -> Generation:
        """Hand the prompts in. Raises ApiError for what this model cannot do, and where no engine answers."""
        choices: list[Choice] = []
        firsts: list[int] = []
        for prompt in prompts:
            firsts.append(len(choices))
            for _ in range(prompt.params.n):
                choices.append(Choice(len(choices), prompt.params, codec.detokenizer(prompt.params)))
        try:
            call = client.submit([replace(p, params=replace(p.params, stop=())) for p in prompts])
        except EngineGone as gone:
            raise ApiError(503, str(gone), retry_after=gone.retry_after) from None
        of_request = dict(zip(call.request_ids, choices, strict=True))
        return cls(
            client,
            prompts,
            choices,
            call,
            observer,
            _of_request=of_request,
            _num_unfinished=len(choices),
            _first_choices=[choices[first] for first in firsts],
        )

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return self._num_unfinished == 0

    async def next(self) -> list[Delta]:
        """What has come since the last call, at least something. Raises ApiError where it cannot go on, and ClientGone
        after `abandon`; then nothing is left running."""
        try:
            arrived = await self.call.next()
        except EngineGone as gone:
            self._give_up("error")
            raise ApiError(503, str(gone), retry_after=gone.retry_after) from None
        deltas = []
        for at, output in arrived:
            choice = self._of_request[output.request_id]
            if not choice.finished:  # else: tokens of a step in flight when its text ended
                deltas.append(self._take(choice, output, at))
        if self._abandoned:  # after these outputs had come, and before they were taken
            raise ClientGone
        return deltas

    def _take(self, choice: Choice, output: TokenOutput, at: float) -> Delta:
        request_id = output.request_id
        if output.finish_reason not in (None, "stop", "length"):
            self._give_up("error")
            if output.finish_reason == "dropped":
                raise ApiError(503, f"the request was dropped: {output.error}", retry_after=1)
            raise ApiError(500, output.error or f"the request has ended: {output.finish_reason}")
        delta = choice.take(output)
        self._num_tokens += len(output.token_ids)
        self.observer.token(request_id, at, len(output.token_ids))
        if choice.finished:
            self._num_unfinished -= 1
            self.observer.ended(request_id, at, delta.finish_reason or "stop")
            if output.finish_reason is None:
                self.client.stop(request_id, choice.num_tokens)
        return delta

    def abandon(self) -> None:
        """The client has gone away: end what runs, and have `next` raise ClientGone."""
        if not self.finished:
            self._abandoned = True
            self._give_up("abort")
            self.call.fail(ClientGone())

    def give_up(self) -> None:
        """End what runs, as nobody will call `next` again."""
        if not self.finished:
            self._give_up("abort")

    def _give_up(self, reason: str) -> None:
        self.client.cancel(self.call)
        for request_id, choice in self._of_request.items():
            if not choice.finished:
                choice.finished = True
                self.observer.ended(request_id, 0.0, reason)
        self._num_unfinished = 0

    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            sum(len(prompt.token_ids) for prompt in self.prompts),
            self._num_tokens,
            sum(choice.num_cached_tokens for choice in self._first_choices),
        )


class ReadAhead:
    """Takes a generation's outputs as they come, however slowly its pieces are taken.

    A client that does not read holds up what is written to it, but a stop string in what it has not read yet must end
    the request all the same. `await next()` until `finished`, as with the generation itself; `close` in any case.
    """

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._deltas: list[Delta] = []
        self._failure: Exception | None = None
        self._news = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @property
    def finished(self) -> bool:
        """Whether every choice has ended, and every piece has been taken."""
        return self._generation.finished and not self._deltas and self._failure is None

    async def _read(self) -> None:
        try:
            while not self._generation.finished:
                deltas = await self._generation.next()
                self._deltas += deltas  # not in one: `next` may have taken the list meanwhile
                self._news.set()
        except Exception as failure:  # whoever takes the next piece is to have it
            self._failure = failure
            self._news.set()

    async def next(self) -> list[Delta]:
        """What has come since the last call, at least something. Raises what the generation has."""
        if not self._deltas and self._failure is None:
            self._news.clear()
            await self._news.wait()
        if self._deltas:
            deltas, self._deltas = self._deltas, []
            return deltas
        assert self._failure is not None
        raise self._failure

    def close(self) -> None:
        """Nobody calls `next` again."""
        self._reading.cancel()
