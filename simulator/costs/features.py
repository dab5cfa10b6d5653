"""The columns that a mode's device times are fitted by, and what their coefficients say as a `ModeFit`'s curves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from policies.shapes import StepShape
from simulator.costs.calibration import DEVICE_TERMS, Slope
from simulator.costs.least_squares import Array

RICH = 200
"""Distinct shapes from which on the price of context may bend, and differ by the size of the step."""
_KNOT_RATIO = 1.5
_CONTEXT_BENDS = tuple(1024 << k for k in range(8))
_LONGEST_BENDS = (128, 512)
_FEWEST = 10  # shapes in a class of sizes


class DeviceFeatures:
    """Which columns there are, chosen by the shapes that were measured.

    Padded tokens enter piecewise linearly, which interpolates between measured sizes whether the curve bends up or down
    (products of few tokens wait for the weights, those of many for arithmetic); captured steps have a level for each
    captured size. Context bends down where a card is not yet full of it, and costs differently in captured batches of
    different sizes, since attention is divided up by the batch. The other terms are what the work is physically linear
    in.
    """

    def __init__(self, shapes: Sequence[StepShape], *, captured: bool) -> None:
        sizes = [shape.padded_tokens for shape in shapes]
        rich = len(set(shapes)) >= RICH
        self._knots = [0, *sorted(set(sizes))[:-1]] if captured else _token_knots(sizes)
        self._context = _below(_CONTEXT_BENDS, max(shape.decode_context for shape in shapes)) if rich else []
        self._longest = _below(_LONGEST_BENDS, max(shape.max_context for shape in shapes)) if rich else []
        self._classes = _size_classes([s.padded_tokens for s in shapes if s.num_decodes]) if rich and captured else []

    def matrix(self, shapes: Sequence[StepShape]) -> Array:
        """[shapes, columns]"""
        tokens, context, longest = (
            np.array([getattr(shape, name) for shape in shapes], np.float64)
            for name in ("padded_tokens", "decode_context", "max_context")
        )
        columns = [np.clip(tokens - low, 0, high - low) for low, high in pairwise(self._knots)]
        columns.append(np.maximum(tokens - self._knots[-1], 0))
        columns += [*(np.minimum(context, bend) for bend in self._context), context]
        columns += [*(np.minimum(longest, bend) for bend in self._longest), longest]
        columns += [context * ((tokens > low) & (tokens <= high)) for low, high in pairwise([*self._classes, np.inf])]
        return np.column_stack([*columns, *(term(shapes, name) for name in DEVICE_TERMS)])

    def named(self, solution: Sequence[float]) -> dict[str, Any]:
        """A coefficient a column, as fields of ModeFit."""
        rest = list(solution)

        def take(count: int) -> list[float]:
            taken, rest[:] = rest[:count], rest[count:]
            return taken

        tokens, context = take(len(self._knots)), take(len(self._context) + 1)
        longest, by_size = take(len(self._longest) + 1), take(len(self._classes))
        return {
            "padded_tokens": _slopes(self._knots, tokens),
            "decode_context": _slopes([0, *self._context], _tails(context)),
            "max_context": _slopes([0, *self._longest], _tails(longest)),
            "context_by_size": _slopes(self._classes or [0], by_size or [0.0]),
            "device": dict(zip(DEVICE_TERMS, rest, strict=True)),
        }


def term(shapes: Sequence[StepShape], name: str) -> Array:
    """One column by its name in the calibration."""
    if name == "step":
        return np.ones(len(shapes))
    if name == "any_decode":
        return np.array([float(shape.num_decodes > 0) for shape in shapes])
    if name == "any_chunk":
        return np.array([float(shape.num_chunks > 0) for shape in shapes])
    return np.array([float(getattr(shape, name)) for shape in shapes])


def _token_knots(sizes: Sequence[int]) -> list[int]:
    """Where the price of a token may change: 0, and measured sizes, each of them at least 1.5 times the one before.

    The last stretch is as long: on a short one, noise would make a slope that larger steps are priced by.
    """
    knots, last = [0], min(sizes)
    for size in sorted(set(sizes)):
        if size >= _KNOT_RATIO * last and max(sizes) >= _KNOT_RATIO * size:
            knots.append(size)
            last = size
    return knots


def _below(bends: Sequence[int], largest: int) -> list[int]:
    return [bend for bend in bends if bend < largest]


def _size_classes(sizes: Sequence[int]) -> list[int]:
    """Powers of two that bound classes of padded sizes from below, with enough shapes in each."""
    classes, count = [0], 0
    for low, high in pairwise([0, *(1 << k for k in range(max(sizes, default=1).bit_length() + 1))]):
        if count >= _FEWEST:
            classes.append(low)
            count = 0
        count += sum(low < size <= high for size in sizes)
    return classes if count >= _FEWEST or len(classes) == 1 else classes[:-1]


def _tails(coefficients: Sequence[float]) -> list[float]:
    """Slopes of a sum of min(size, bend): beyond a bend, those with a later one still rise."""
    return [float(value) for value in np.cumsum(coefficients[::-1])[::-1]]


def _slopes(above: Sequence[int], prices: Sequence[float]) -> list[Slope]:
    return [Slope(above=low, ns=ns) for low, ns in zip(above, prices, strict=True)]
