from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from policies import registry
from policies.draft import Draft
from policies.plan import Mode, Report
from policies.random_stream import RandomStream
from policies.registry import register
from policies.request import Request

Ints = npt.NDArray[np.int64]


def peak_tokens(held: Ints, left: Ints, per_request: int = 0) -> int:
    """The most tokens held at any time by requests that all get one token a step and go when they have no more to get.

    `held` is by request; `left` too, or has a row of them for each sample. Memory is at its most just before somebody
    goes, so with `left` sorted descending it is max_i (i * left_i + sum of held_j, j <= i). `per_request` is added for
    everybody who is there.
    """
    return Crowd.of(held, np.atleast_2d(left)).peak(per_request)


@dataclass(frozen=True, slots=True)
class Crowd:
    """Who holds memory, whoever goes last first: tokens held and still to come, a row for each sample."""

    held: Ints
    left: Ints

    @classmethod
    def of(cls, held: Ints, left: Ints) -> Crowd:
        order = np.argsort(-left, axis=1, kind="stable")
        return cls(held[order], np.take_along_axis(left, order, axis=1))

    def with_one_more(self, held: int, left: Ints) -> Crowd:
        """It stands behind those that go with it. `left`: by sample."""
        place = (self.left >= left[:, None]).sum(axis=1)
        others = np.arange(self.left.shape[1] + 1) != place[:, None]
        crowd = Crowd(np.full(others.shape, held), np.empty(others.shape, np.int64))
        crowd.held[others], crowd.left[others] = self.held.ravel(), self.left.ravel()
        crowd.left[~others] = left
        return crowd

    def peak(self, per_request: int) -> int:
        count = np.arange(1, self.left.shape[1] + 1)
        return int((count * (self.left + per_request) + self.held.cumsum(axis=1)).max())


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
    Cost: in a step in which somebody waits, `samples` draws for each who runs, and O(samples * running log running);
    then `samples` draws and O(samples * running) a candidate, all in NumPy: some 0.1 ms each with 256 running.
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
        self._crowd = Crowd.of(np.empty(0, np.int64), np.empty((1, 0), np.int64))  # who runs after this draft
        self._asked: tuple[Request, Crowd] | None = None  # the last candidate, and all with it
        self._kept: dict[int, int] = {}  # blocks of paused requests

    def allows(self, request: Request, first_blocks: int, all_blocks: int, draft: Draft) -> bool:
        self._look(draft)
        crowd = self._crowd.with_one_more(*self._forecast_one(request))
        self._asked = (request, crowd)
        kept = sum(self._kept.values()) - self._kept.get(request.id, 0)
        size = self._block_size
        return crowd.peak(size - 1) <= (self._limit * draft.view.num_blocks - kept) * size

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
            new = draft.admitted[self._counted[0] :]
            if new and self._asked is not None and self._asked[0] is new[0]:
                self._crowd = self._asked[1]
                del new[0]
            for request in new:
                self._crowd = self._crowd.with_one_more(*self._forecast_one(request))
        else:
            stay = [r for r in draft.view.running.values() if r.id not in draft.preempted]
            self._crowd = Crowd.of(*self._forecast([*stay, *draft.admitted]))
        self._draft, self._counted, self._asked = draft, counted, None
        kept = [*draft.view.paused.values(), *(r for r, mode in draft.plan.preempt if mode is Mode.KEEP)]
        gone = {r.id for r in draft.admitted} | {r.id for r, mode in draft.plan.preempt if mode is not Mode.KEEP}
        self._kept = {r.id: r.num_blocks for r in kept if r.id not in gone}

    def _forecast(self, requests: Sequence[Request]) -> tuple[Ints, Ints]:
        """Tokens held, by request, and still to come, by sample and request."""
        held = np.array([r.num_tokens for r in requests], np.int64)
        done = held - np.array([r.num_prompt_tokens for r in requests], np.int64)
        cap = np.array([r.max_tokens for r in requests], np.int64)
        if self._predictor is not None:
            final = np.array([[self._predict(r) for r in requests]], np.int64)
        else:
            final = self._draw(np.array([r.id for r in requests], np.int64), done, cap)
        return held, np.maximum(1, np.minimum(final, cap) - done)

    def _forecast_one(self, request: Request) -> tuple[int, Ints]:
        """The same of one, in a fraction of the time; what is still to come by sample alone."""
        done, cap = request.num_output_tokens, request.max_tokens
        beyond, size = bisect_right(self._sorted, done), len(self._sorted)
        if self._predictor is not None:
            final = np.array([self._predict(request)], np.int64)
        elif beyond == size:
            final = np.full(self._samples, cap, np.int64)
        else:
            counters = range(done * self._samples, (done + 1) * self._samples)
            uniform = np.array([self._stream.uniform(request.id, counter) for counter in counters])
            final = self._length_at(beyond + uniform * max(0, size - 1 - beyond))
        return request.num_tokens, np.maximum(1, np.minimum(final, cap) - done)

    def _predict(self, request: Request) -> int:
        return 0 if self._predictor is None else math.ceil(self._predictor.predict(request))

    def _draw(self, ids: Ints, done: Ints, cap: Ints) -> Ints:
        """Final lengths: a row for each sample."""
        size = len(self._sorted)
        beyond = np.searchsorted(np.array(self._sorted, np.int64), done, side="right")
        counters = done * self._samples + np.arange(self._samples)[:, None]
        if not size or not ids.size:
            return np.broadcast_to(cap, counters.shape)
        place = beyond + self._stream.uniform_array(ids, counters) * np.maximum(0, size - 1 - beyond)
        return np.where(beyond < size, self._length_at(place), cap)

    def _length_at(self, place: npt.NDArray[np.float64]) -> Ints:
        """The outputs in the window in order, and between two of them a whole number between."""
        return np.ceil(np.interp(place, np.arange(len(self._sorted)), self._sorted)).astype(np.int64)
