"""What tests of how engines and their requests end share: prompts, and waiting."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from runtime.engine import Engine
from runtime.weights import LoadedModel
from tests.runtime.engines import PATIENCE


def some_prompts(count: int, seed: int = 7, low: int = 2, high: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(512) for _ in range(rng.randint(low, high))] for _ in range(count)]


def all_free(engine: Engine) -> bool:
    return engine._plane.view.num_free_blocks == engine.limits.num_blocks


def wait_until_it_is(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.002)


def fail_after(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, steps: int) -> None:
    """The model computes so many steps more, and none after them."""
    forward, left = loaded.model.forward, [steps]

    def fail(inputs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise ArithmeticError("the card is on fire")
        return forward(inputs)

    monkeypatch.setattr(loaded.model, "forward", fail)
