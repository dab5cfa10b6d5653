from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Mapping, Sequence

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
    return int(Peaks(held, left, per_request).by_end.max())


class Peaks:
    """Who holds memory, by the time at which they go, the last first; a row for each sample of what is left."""

    def __init__(self, held: Ints, left: Ints, per_request: int) -> None:
        self._per_request = per_request
        self._sort(np.broadcast_to(held, np.atleast_2d(left).shape), np.atleast_2d(left))

    def add(self, held: int, left: Ints) -> None:
        """One more, who stands last of those that go with it; `left` by sample."""
        row = np.full((len(left), 1), held)
        self._sort(np.concatenate((self._held, row), axis=1), np.concatenate((self._left, left[:, None]), axis=1))

    def _sort(self, held: Ints, left: Ints) -> None:
        order = np.argsort(-left, axis=1, kind="stable")  # of what is in order but for one, in a time that grows with n
        self._held, self._left = np.take_along_axis(held, order, axis=1), np.take_along_axis(left, order, axis=1)
        self._sum = np.cumsum(self._held, axis=1)
        self._each = self._left + self._per_request
        self.by_end = np.arange(1, held.shape[1] + 1) * self._each + self._sum  # what all hold just before each goes

    def with_one_more(self, held: int, left: Ints) -> int:
        """The peak if there were one more: those who go after it hold what they did, the others have it beside them."""
        if not self._held.shape[1]:
            return held + int(left.max()) + self._per_request
        later = self._left >= left[:, None]
        count = later.sum(axis=1)
        before = np.where(count > 0, self._sum[np.arange(len(left)), count - 1], 0)
        own = (count + 1) * (left + self._per_request) + before + held
        others = self.by_end + np.where(later, 0, self._each + held)
        return int(max(own.max(), others.max()))


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
        self._peaks = Peaks(np.empty(0, np.int64), np.empty((1, 0), np.int64), 0)  # of who runs after this draft
        self._asked: tuple[Request, int, Ints] | None = None  # the last candidate, tokens held and to come
        self._kept: dict[int, int] = {}  # blocks of paused requests

    def allows(self, request: Request, first_blocks: int, all_blocks: int, draft: Draft) -> bool:
        self._look(draft)
        held, left = self._forecast_one(request)
        self._asked = (request, held, left)
        kept = sum(self._kept.values()) - self._kept.get(request.id, 0)
        size = self._block_size
        return self._peaks.with_one_more(held, left) <= (self._limit * draft.view.num_blocks - kept) * size

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
            for request in draft.admitted[self._counted[0] :]:
                same = self._asked is not None and self._asked[0] is request
                held, left = self._asked[1:] if self._asked is not None and same else self._forecast_one(request)
                self._peaks.add(held, left)
        else:
            stay = [r for r in draft.view.running.values() if r.id not in draft.preempted]
            self._peaks = Peaks(*self._forecast([*stay, *draft.admitted]), self._block_size - 1)
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
