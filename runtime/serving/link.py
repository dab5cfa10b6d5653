"""The way to one engine: how frames reach it, and how its end becomes known. What frames mean is the proxy's affair."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

CLOSE_SECONDS = 20.0
"""How long an engine that was told to stop may take to end (it closes its record) before it is given up."""

LAST_WORDS_SECONDS = 0.25
"""How long the last message of an engine that has ended may be on its way."""


class Link(ABC):
    """A link is opened once and closed once."""

    @abstractmethod
    async def open(self, on_message: Callable[[bytes], None], on_end: Callable[[str], None]) -> None:
        """Reach the engine, or start it; it says by a message that it is ready.

        `on_message` gets each frame from it, `on_end` the reason once the engine is gone. Raises EngineStartError.
        """

    @abstractmethod
    def send(self, data: bytes) -> None:
        """Queue a frame for the engine. Never waits; where nobody is left, the frame is dropped."""

    @abstractmethod
    def kill(self) -> None:
        """Give up an engine that gives no sign of life. Never waits; `close` is still to be called."""

    @abstractmethod
    async def close(self, shutdown: bytes | None) -> None:
        """End the engine: by the frame `shutdown`, or, where it does not listen yet (None), by force.

        Frames that come until then are still handed on. Nothing is left afterwards.
        """
