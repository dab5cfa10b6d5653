from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from policies import registry
from policies.draft import Draft
from policies.plan import Mode, Report
from policies.random_stream import RandomStream
from policies.registry import register
from policies.request import Request


def peak_tokens(held: npt.NDArray[np.int64], left: npt.NDArray[np.int64], per_request: int = 0) -> int:
    """The most tokens held at any time by requests that all get one token a step and go when they have no more to get.

    `held` is by request; `left` too, or has a row of them for each sample. Memory is at its most just before somebody
    goes, so with `left` sorted descending it is max_i (i * left_i + sum of held_j, j <= i). `per_request` is added for
    everybody who is there.
    """
    order = np.argsort(-left, axis=-1, kind="stable")
    first = np.take_along_axis(left, order, axis=-1)
    count = np.arange(1, held.size + 1)
    return int(np.max(count * (first + per_request) + np.cumsum(held[order], axis=-1)))


@register("admission", "predicted_peak")
class PredictedPeak:
    """Let a request in if the memory that everybody will hold at the worst time to come stays below a share of all.

    With held_j the tokens of request j and left_j those still to come, sorted by left, most first, the peak is
    max_i (i * left_i + sum of held_j, j <= i). `estimates` says where left comes from:
    `history` (default): final lengths drawn from the last `window` outputs (200), those beyond what the request has
    generated, with linear interpolation; its cap where there are none, and never more. Of `samples` (5) sets of draws
    the worst peak counts. Draws are keyed by request and tokens generated, so each token means new ones.
    A predictor's name: `declared` (where nothing is declared, the cap) is lightllm's, S-LoRA's and Vidur's rule,
    `oracle` is clairvoyant. Whoever outlives its estimate is taken to have one more token to come.
    `limit` (0.95): the share of all blocks that the peak may take, itself included.

    Departures: blocks are rounded up, block_size - 1 tokens for everybody present, which bounds every rounding and with
    blocks of 1 is the formula itself. Sequences are counted up to the last output token, one more than is ever written
    without `lag`. Lightllm compares `<` where we say `<=`, draws from an unseeded generator, and its later versions
    estimate by 1.1 times what is generated. The formula takes it that all advance together: a prompt that takes several
    steps makes its request end later than said, and somebody may be preempted for it. Shared prefixes are not counted
    on, what paused requests hold is.
    Cost: O(running) a step in which somebody waits, and O(samples * m log m), in NumPy, a candidate.
    Source: Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees", ASPLOS 2025.
    """

    def __init__(
        self,
        block_size: int,
        estimates: str = "history",
        limit: float = 0.95,
        window: int = 200,
        samples: int = 5,
        oracle: Mapping[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 < limit <= 1:
            raise ValueError(f"limit must be above 0 and at most 1, not {limit}")
        if window < 1 or samples < 1:
            raise ValueError(f"window and samples must be at least 1, not {window} and {samples}")
        self._block_size = block_size
        self._limit = limit
        self._window, self._samples = window, samples
        self._predictor = None
        if estimates != "history":
            self._predictor = registry.make_inner("predictor", estimates, oracle=oracle, seed=seed)
        self.clairvoyant = registry.is_clairvoyant(self._predictor)
        self._stream = RandomStream(seed, "predicted_peak")
        self._last: deque[int] = deque()
        self._sorted: list[int] = []
        self._draft: Draft | None = None
        self._counted = (0, 0)  # how many this draft had admitted and preempted
        self._held = np.empty(0, np.int64)
        self._left = np.empty((1, 0), np.int64)
        self._kept: dict[int, int] = {}  # blocks of paused requests

    def allows(self, request: Request, first_blocks: int, all_blocks: int, draft: Draft) -> bool:
        self._look(draft)
        held, left = self._forecast([request])
        size = self._block_size
        peak = peak_tokens(np.append(self._held, held), np.append(self._left, left, axis=1), size - 1)
        kept = sum(self._kept.values()) - self._kept.get(request.id, 0)
        return peak <= (self._limit * draft.view.num_blocks - kept) * size

    def on_admit(self, request: Request) -> None:
        """Nothing is promised; those that run are looked at."""

    def on_release(self, request: Request) -> None:
        """As above."""

    def on_report(self, report: Report) -> None:
        for request, _, num_output_tokens in report.finished:
            if self._predictor is not None:
                self._predictor.on_end(request, num_output_tokens)
                continue
            self._last.append(num_output_tokens)
            insort(self._sorted, num_output_tokens)
            if len(self._last) > self._window:
                self._sorted.pop(bisect_right(self._sorted, self._last.popleft()) - 1)

    def _look(self, draft: Draft) -> None:
        """Take in who runs after this draft, as far as it has changed since the last candidate."""
        counted = (len(draft.admitted), len(draft.preempted))
        if draft is self._draft and counted[1] == self._counted[1]:
            held, left = self._forecast(draft.admitted[self._counted[0] :])
            self._held, self._left = np.append(self._held, held), np.append(self._left, left, axis=1)
        else:
            stay = [r for r in draft.view.running.values() if r.id not in draft.preempted]
            self._held, self._left = self._forecast([*stay, *draft.admitted])
        self._draft, self._counted = draft, counted
        kept = [*draft.view.paused.values(), *(r for r, mode in draft.plan.preempt if mode is Mode.KEEP)]
        gone = {r.id for r in draft.admitted} | {r.id for r, mode in draft.plan.preempt if mode is not Mode.KEEP}
        self._kept = {r.id: r.num_blocks for r in kept if r.id not in gone}

    def _forecast(self, requests: Iterable[Request]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Tokens held, by request, and still to come, by sample and request."""
        rows = [(r.id, r.num_tokens, r.num_output_tokens, r.max_tokens, self._predict(r)) for r in requests]
        ids, held, done, cap, said = np.array(rows, np.int64).reshape(-1, 5).T
        final = said[None, :] if self._predictor is not None else self._draw(ids, done, cap)
        return held, np.maximum(1, np.minimum(final, cap) - done)

    def _predict(self, request: Request) -> int:
        return 0 if self._predictor is None else math.ceil(self._predictor.predict(request))

    def _draw(
        self, ids: npt.NDArray[np.int64], done: npt.NDArray[np.int64], cap: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Final lengths: a row for each sample."""
        lengths = np.array(self._sorted, np.int64)
        beyond = np.searchsorted(lengths, done, side="right")
        counters = done * self._samples + np.arange(self._samples)[:, None]
        if not lengths.size or not ids.size:
            return np.broadcast_to(cap, counters.shape)
        place = beyond + self._stream.uniform_array(ids, counters) * np.maximum(0, lengths.size - 1 - beyond)
        drawn = np.ceil(np.interp(place, np.arange(lengths.size), lengths)).astype(np.int64)
        return np.where(beyond < lengths.size, drawn, cap)
