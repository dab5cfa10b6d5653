"""The highest rate at which something still holds."""

from __future__ import annotations

from collections.abc import Callable

CLIMB = 1.6


def highest_rate(holds: Callable[[float], bool], low: float, high: float, within: float = 0.05) -> float:
    """The rate between `low` and `high` up to which it holds, to a share `within` of it.

    It climbs from `low` until it holds no more, then bisects: what is far beyond is never asked, as a run of finite
    length says little of an overload. `low` where it does not hold even there; `high` says: at least that. This is not
    `capacity.search.find`: that one leaps outwards from a guess in squared steps, and closes in by how far a load is
    from its limit; here there is only yes or no.
    """
    if not holds(low):
        return low
    above = low
    while above < high:
        above = min(high, low * CLIMB)
        if not holds(above):
            break
        low = above
    else:
        return high
    while above - low > within * low:
        middle = (low * above) ** 0.5
        low, above = (middle, above) if holds(middle) else (low, middle)
    return low
