"""Random streams, one a purpose: drawing more arrivals never changes a length."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def stream(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """The random stream for (seed, purpose, index).

    Raises:
        ValueError: a negative seed.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more")
    tag = int.from_bytes(blake2b(purpose.encode(), digest_size=8).digest(), "little")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, tag, index))))
