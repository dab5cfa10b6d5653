from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice, pairwise

from policies import registry
from policies.draft import Draft
from policies.key_queue import first_of
from policies.plan import Report
from policies.registry import register
from policies.request import Request

Batch = dict[int, Request]
Arrival = tuple[int, int, Request]
MOST_NEWCOMERS = 256
"""Put into bins in one plan: no plan starts more, and a burst takes its time."""


@register("queue", "multi_bin")
class MultiBin:
    """Multi-Bin batching: requests of like predicted length make up a batch, for `static`.

    Bins by predicted output tokens, first come, first served in each: bin i holds lengths from `edges`[i-1] up to but
    not `edges`[i] (`edges=64;256` makes three; the paper's have equal shares of the requests, which is for the user to
    know). A bin with `batch` members is a batch; batches are served in the order in which they came to be full. Give
    `static,max_batch_size` the same number. A batch then lasts as long as its longest member, which for lengths uniform
    on [a, b], k bins and B members is on average

        (a + b) / 2 + (b - a) / (2 k) * (B - 1) / (B + 1)    (steps),

    so the throughput goes to that of batches without waste as k grows. Where nobody waits for the longest, as under
    `mixed`, there is nothing to gain.

    Where this departs: a bin that is not full is served all the same, `max_wait_ms` after its first member came, or
    else the last requests would never be. A batch that does not fit into memory is served in parts. Whoever has run
    before goes with the next batch. A plan admits of one batch at most.
    `predictor` as in `sjf`. Of those that came since the last plan 256 are put into bins in one plan (or as many as are
    sure to fill one), the first to come first, the others in the next ones. O(log n) an arrival, O(bins) a batch.
    Source: Guldogan et al., "Multi-Bin Batching for Increasing LLM Inference Throughput", arXiv 2412.04504.
    """

    def __init__(
        self,
        edges: str = "64;128;256;512",
        batch: int = 8,
        max_wait_ms: float = 1000.0,
        predictor: str = "declared",
        oracle: Mapping[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        try:
            self._edges = [float(edge) for edge in edges.split(";") if edge]
        except ValueError:
            raise ValueError(f"edges must be numbers with ; between, not {edges!r}") from None
        if not all(a < b for a, b in pairwise([0.0, *self._edges])):
            raise ValueError(f"edges must be above 0 and grow, unlike {edges!r}")
        if batch < 1 or max_wait_ms < 0:
            raise ValueError("batch must be at least 1 and max_wait_ms at least 0")
        self._predictor = registry.make_inner("predictor", predictor, oracle=oracle, seed=seed)
        self.clairvoyant = registry.is_clairvoyant(self._predictor)
        self._batch = batch
        self._max_wait = round(max_wait_ms * 1e6)
        self._new: Batch = {}  # not in a bin yet
        self._arrivals: deque[Arrival] = deque()  # of them, in order, those no longer new among them
        self._late: list[Arrival] = []  # a heap of those that were not pushed in the order of arrival
        self._most_new = max(MOST_NEWCOMERS, batch * (len(self._edges) + 1))  # that many fill a bin at least
        self._bins: list[Batch] = [{} for _ in range(len(self._edges) + 1)]
        self._full: deque[tuple[int, Batch]] = deque()  # and since when
        self._open: Batch = {}  # being admitted
        self._may_open = True  # until the first of this plan is popped
        self._place: dict[int, Batch] = {}  # where a waiting request is

    def push(self, request: Request, now: int) -> None:
        if request.first_scheduled_ns is None:
            self._put(request, self._new)
            arrival = (*request.key, request)
            if not self._arrivals or arrival > self._arrivals[-1]:
                self._arrivals.append(arrival)
            else:
                heapq.heappush(self._late, arrival)
        else:
            self._put(request, self._open)

    def _put(self, request: Request, place: Batch) -> None:
        self.remove(request)
        place[request.id] = request
        self._place[request.id] = place

    def begin(self, draft: Draft, now: int) -> None:
        self._may_open = True
        edges, predict, bins, place = self._edges, self._predictor.predict, self._bins, self._place
        for request in islice(self._newcomers(), self._most_new):
            index = bisect_right(edges, predict(request))
            del self._new[request.id]  # and not by `_put`: a burst's are many
            members = place[request.id] = bins[index]
            members[request.id] = request
            if len(members) == self._batch:
                self._full.append((now, members))
                bins[index] = {}
        due = self._first_due()
        if due is not None and due[0] > now:
            draft.wake_at(due[0])

    def _newcomers(self) -> Iterator[Request]:
        """Those that are in no bin yet, by arrival; each is to be put into one."""
        line, late, new = self._arrivals, self._late, self._new
        while line or late:
            first = heapq.heappop(late) if late and (not line or late[0] < line[0]) else line.popleft()
            request = first[2]
            if new.get(request.id) is request:
                yield request

    def _first_due(self) -> tuple[int, int] | None:
        """When the first of the bins that are not full is to be served all the same, and which one that is."""
        heads = [(next(iter(members.values())).key, i) for i, members in enumerate(self._bins) if members]
        if not heads:
            return None
        (arrival, _), index = min(heads)
        return arrival + self._max_wait, index

    def peek(self, now: int) -> Request | None:
        if not self._open and self._may_open:
            self._open_next(now)
        return next(iter(self._open.values()), None)

    def _open_next(self, now: int) -> None:
        while self._full and not self._full[0][1]:  # all cancelled
            self._full.popleft()
        due = self._first_due()
        if due is not None and due[0] <= (self._full[0][0] if self._full else now):
            self._open, self._bins[due[1]] = self._bins[due[1]], {}
        elif self._full:
            self._open = self._full.popleft()[1]

    def pop(self, now: int) -> Request:
        request = first_of(self, now)
        self._may_open = False
        self.remove(request)
        return request

    def remove(self, request: Request) -> None:
        place = self._place.pop(request.id, None)
        if place is not None:
            del place[request.id]

    def on_report(self, report: Report) -> None:
        for request, _, num_output_tokens in report.finished:
            self._predictor.on_end(request, num_output_tokens)
