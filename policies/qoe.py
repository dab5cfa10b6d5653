"""Quality of experience (QoE) of streamed text: what a user has read by when, against what they expect. Pure.

A client buffers tokens and shows one every `tpot_ns`, from `ttft_ns` after the request on, as far as they have come:
what comes early waits in the buffer, what comes late is late for good. QoE is the area under the curve of tokens shown
over time divided by that under the curve expected, one token every `tpot_ns` from `ttft_ns` on; both up to the end,
when the last token has been shown for `tpot_ns`. So it lies between 0 and 1, and is 1 exactly if nothing was late.

Source: Liu et al., "Andes", arXiv 2404.16283, section 3, with curves of whole tokens (`qoe`) beside smooth ones
(`read_on`). Here a token is not shown before it is expected, so that a fast start cannot make up for a stall that the
user sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]


def shown_ns(delivered_ns: Sequence[int], ttft_ns: int, tpot_ns: int) -> list[int]:
    """When the user sees each token. All times since the request was made; `delivered_ns` does not descend."""
    shown: list[int] = []
    at = ttft_ns - tpot_ns
    for delivered in delivered_ns:
        at = max(delivered, at + tpot_ns)
        shown.append(at)
    return shown


def qoe(
    delivered_ns: Sequence[int],
    ttft_ns: int,
    tpot_ns: int,
    until_ns: int | None = None,
    num_tokens: int | None = None,
) -> float:
    """QoE of a whole answer; or by `until_ns`, of one that is to have `num_tokens`. 1 where nothing is expected yet."""
    shown = shown_ns(delivered_ns, ttft_ns, tpot_ns)
    if until_ns is None:
        until_ns = shown[-1] + tpot_ns if shown else 0
    count = len(shown) if num_tokens is None else num_tokens
    actual = sum(max(0, until_ns - at) for at in shown)
    expected = sum(max(0, until_ns - ttft_ns - k * tpot_ns) for k in range(count))
    return actual / expected if expected else 1.0


def read_on(
    shown: Column, delivered: Column, pace: Column, lead: Column, wait: Column, rate: Column, span: Column
) -> tuple[Column, Column]:
    """The next `span` ns with smooth curves: the area under the curve of tokens shown, and how many are shown then.

    `shown` of `delivered` tokens are shown now; more are delivered at `rate` (tokens a ns) from `wait` ns on, and shown
    at most at `pace` from `lead` ns on. A column a request, units tokens and ns.
    """
    delivered = delivered + rate * np.maximum(0.0, lead - wait)  # from here on, time counts from `lead`
    wait, span = np.maximum(0.0, wait - lead), np.maximum(0.0, span - lead)
    slope = np.minimum(rate, pace)  # of the curve once the buffer is empty
    buffer = np.maximum(0.0, delivered - shown)
    gap = np.where(pace > slope, pace - slope, 1.0)
    dry = np.where(buffer <= pace * wait, buffer / pace, np.where(pace > slope, (buffer - slope * wait) / gap, np.inf))
    dry = np.minimum(dry, span)
    ahead, after = np.maximum(0.0, span - wait), np.maximum(0.0, dry - wait)
    area = shown * dry + pace * dry**2 / 2 + delivered * (span - dry) + slope * (ahead**2 - after**2) / 2
    return area, np.minimum(shown + pace * span, delivered + slope * ahead)


def expected_area(pace: Column, since_due: Column) -> Column:
    """The area under the expected curve, `since_due` ns after the first token was due."""
    return pace * np.maximum(0.0, since_due) ** 2 / 2
