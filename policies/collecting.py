"""Python's garbage collector, while requests are served or simulated.

Both make millions of small objects and next to no cycles. A full collection goes over all that there is, imported
libraries too: 0.1 to 0.3 seconds with PyTorch, in which no step is planned.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_THRESHOLDS = (100_000, 20, 100)


@contextmanager
def few_collections() -> Iterator[None]:
    """Within, for a run that ends, the collector looks at new objects seldom, and at all of them hardly ever."""
    thresholds = gc.get_threshold()
    gc.set_threshold(*_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def settle() -> None:
    """For a process that has started and serves from now on: what there is now is not looked at again."""
    gc.collect()
    gc.freeze()
