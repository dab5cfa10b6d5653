"""A client that reads slowly, or not at all, does not keep a request running past its stop string."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import Message

from runtime.detokenizer import IncrementalDetokenizer
from runtime.sampling.params import SamplingParams
from runtime.sequence import Details
from runtime.serving.answer import Answer
from runtime.serving.engine_client import Call, EngineGone, Prompt
from runtime.serving.generation import Delta, Generation
from runtime.serving.messages import TokenOutput


class Engine:
    """Takes one prompt, and is told what to answer."""

    def __init__(self) -> None:
        self.call = Call()
        self.call.request_ids = [0]
        self.stopped: list[tuple[int, int]] = []
        self.cancelled = False

    def submit(self, prompts: Sequence[Prompt]) -> Call:
        return self.call

    def stop(self, request_id: int, num_output_tokens: int) -> None:
        self.stopped.append((request_id, num_output_tokens))

    def cancel(self, call: Call) -> None:
        self.cancelled = True

    def say(self, text: str) -> None:
        for byte in text.encode():
            self.call.put(0.0, TokenOutput(0, (byte,)))


class Codec:
    """Bytes are tokens."""

    def detokenizer(self, params: SamplingParams) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(lambda token_id: bytes([token_id]), (), params)


class Plain:
    """The text of the pieces, as it is."""

    def events(self, deltas: Sequence[Delta]) -> bytes:
        return "".join(delta.text for delta in deltas).encode()

    def last_events(self) -> bytes:
        return b"!"

    def take(self, deltas: Sequence[Delta]) -> None: ...

    def whole(self) -> bytes:
        return b""


class Nobody:
    """No metrics."""

    def token(self, *about: Any) -> None: ...
    def ended(self, *about: Any) -> None: ...


class Reader:
    """A client of whose answer nothing leaves until it `reads`."""

    def __init__(self, engine: Engine, stop: tuple[str, ...] = ("END",)) -> None:
        params = SamplingParams(max_tokens=100, stop=stop)
        prompts = [Prompt([1], params, Details())]
        generation = Generation.start(engine, Codec(), prompts, Nobody())  # type: ignore[arg-type]
        self.reads, self.leaves = asyncio.Event(), asyncio.Event()
        self.received = b""
        answer = Answer(generation, Plain(), stream=True, timeout_s=0)
        self.answered = asyncio.create_task(answer({"type": "http"}, self._receive, self._send))

    async def _receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.received += message.get("body", b"")
        await self.reads.wait()

    async def everything(self) -> bytes:
        """Read to the end."""
        self.reads.set()
        await asyncio.wait_for(self.answered, 5)
        return self.received


def test_a_stop_string_ends_the_request_before_the_client_has_read_it() -> None:
    async def main() -> None:
        engine = Engine()
        reader = Reader(engine)
        for text in ("one ", "two ", "thr", "ee EN", "Dless"):
            engine.say(text)
            await asyncio.sleep(0.01)
        assert engine.stopped == [(0, 17)]
        assert reader.received == b""
        assert await reader.everything() == b"one two three !data: [DONE]\n\n"
        assert not engine.cancelled

    asyncio.run(main())


@pytest.mark.parametrize("stop", [("END",), ()])
def test_what_ends_an_answer_otherwise_reaches_a_slow_reader_after_its_text(stop: tuple[str, ...]) -> None:
    async def main() -> None:
        engine = Engine()
        reader = Reader(engine, stop)
        engine.say("one ")
        await asyncio.sleep(0.01)
        engine.say("two ")
        engine.call.fail(EngineGone("it has died"))
        await asyncio.sleep(0.01)
        received = await reader.everything()
        assert received.startswith(b"one two data: ")
        assert b"it has died" in received

        engine = Engine()
        reader = Reader(engine, stop)
        engine.say("one ")
        await asyncio.sleep(0.01)
        reader.leaves.set()
        await asyncio.sleep(0.01)
        assert engine.cancelled
        await reader.everything()
        assert len(asyncio.all_tasks()) == 1  # nobody reads on

    asyncio.run(main())
