"""What tests of how engines and their requests end share: prompts, and waiting."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from runtime.engine import Engine
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
