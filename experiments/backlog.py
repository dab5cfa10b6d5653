"""The measure of the fairness literature: how far apart two tenants are served while both have requests waiting.

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, section 4: |W_f(t1, t2) - W_g(t1, t2)|, at its
largest over all intervals in which both tenants are backlogged, that is have somebody waiting throughout. A fair policy
bounds it however long the interval is (VTC by 2 max(w_p L_input, w_q M) at equal weights); another lets it grow.

A request waits from its arrival until it is first scheduled, or ends without that; once preempted, it is not counted as
waiting again, as no record of a request says when that was. Tenants wait on a replica if they wait on any.

Between two tenants let D = W_f - W_g. Over the parts of a stretch in which both are backlogged, the largest difference
is max D - min D over the stretch, its beginning included. So a pair takes one sort of its service and waiting times:
O(e log e) for e of them, and all pairs of m tenants O(m e log e) at worst. As a pair differs by no more than one of
them is served in one stretch of its own backlog, pairs are tried from the largest such service on, and those that
cannot differ by more than what was found are left out; nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.fairness import services
from experiments.records import Run

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class ServiceGap:
    """From `start_ns` to `end_ns` both tenants had requests waiting, and `ahead` was given `service` more."""

    service: float
    ahead: str
    behind: str
    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class _Tenant:
    """Moments are 2 t for tokens that come at time t, which were computed before, and 2 t + 1 for what begins at t.

    Attributes:
        spans: [stretches, 2] moments; the tenant is backlogged at start <= moment < end.
        moments, total: when it was given something, ascending, and all it was given up to then; from 0 before all.
    """

    name: str
    spans: Int64
    moments: Int64
    total: Float64

    def given_before(self, moments: Int64) -> Float64:
        """All that it was given before these moments."""
        return self.total[np.searchsorted(self.moments, moments)]

    @property
    def most(self) -> float:
        """The most that it is given in one stretch of its own backlog: no pair with another differs by more of it."""
        given = self.given_before(self.spans[:, 1]) - self.given_before(self.spans[:, 0])
        return float(given.max(initial=0.0))


def largest_gap(
    run: Run, *, input_weight: float = 1.0, output_weight: float = 2.0, weights: Mapping[str, float] | None = None
) -> ServiceGap | None:
    """The largest difference between any two tenants over any interval in which both are backlogged.

    Args:
        input_weight, output_weight: what a token is counted as, as in `service_received`.
        weights: of tenants, 1 for those not named; service is divided by them. Raises ValueError unless positive.

    None where no two tenants are ever backlogged at once: then nothing can be said.
    """
    weights = weights or {}
    if any(not weight > 0 for weight in weights.values()):
        raise ValueError(f"weights of tenants must be above 0, not {dict(weights)}")
    tenants = _tenants(run, input_weight, output_weight, weights)
    bounds = {tenant.name: tenant.most for tenant in tenants}
    tenants.sort(key=lambda tenant: (-bounds[tenant.name], tenant.name))
    found: ServiceGap | None = None
    for i, one in enumerate(tenants):
        if found is not None and bounds[one.name] <= found.service:
            break
        for other in tenants[i + 1 :]:
            gap = _gap(one, other)
            if gap is not None and (found is None or gap.service > found.service):
                found = gap
    return found


def _tenants(run: Run, input_weight: float, output_weight: float, weights: Mapping[str, float]) -> list[_Tenant]:
    given = services(run, input_weight, output_weight)
    moments = 2 * given["t_ns"].to_numpy(np.int64) + given["is_input"].to_numpy(np.int64)
    order = np.argsort(moments, kind="stable")
    owner, service = given["tenant"].to_numpy()[order], given["service"].to_numpy(np.float64)[order]
    moments = moments[order]

    requests = run.requests[run.requests["status"] != "refused"]
    ends = requests["first_scheduled_ns"].fillna(requests["first_token_ns"]).fillna(requests["finish_ns"])
    last = int(moments[-1]) // 2 if len(moments) else 0
    waits = np.stack([requests["arrival_ns"].to_numpy(np.int64), ends.to_numpy(np.int64, na_value=last)], axis=1)
    waiter = requests["tenant"].to_numpy()

    made = []
    for name in sorted(set(waiter)):
        mine = owner == name
        total = np.concatenate([[0.0], np.cumsum(service[mine])]) / weights.get(name, 1.0)
        made.append(_Tenant(name, _union(2 * waits[waiter == name] + 1), moments[mine], total))
    return made


def _union(spans: Int64) -> Int64:
    """Half-open spans as stretches that neither overlap nor touch, in order."""
    spans = spans[spans[:, 0] < spans[:, 1]]
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    reach = np.maximum.accumulate(spans[:, 1])
    begins = np.append(True, spans[1:, 0] > reach[:-1])[: len(spans)]
    ends = np.append(begins[1:], True)[: len(spans)]
    return np.stack([spans[begins, 0], reach[ends]], axis=1)


def _both(one: Int64, other: Int64) -> Int64:
    """Where the stretches of two lists overlap, in order."""
    starts = np.sort(np.concatenate([one[:, 0], other[:, 0]]))
    # At most one stretch of each list holds a start: the last that began by then.
    ends = [np.append(s[:, 1], -1)[np.searchsorted(s[:, 0], starts, side="right") - 1] for s in (one, other)]
    spans = np.stack([starts, np.minimum(*ends)], axis=1)
    spans = spans[spans[:, 0] < spans[:, 1]]
    return np.unique(spans, axis=0)


def _gap(one: _Tenant, other: _Tenant) -> ServiceGap | None:
    spans = _both(one.spans, other.spans)
    if not len(spans):
        return None
    # D at all beginnings and after each service, which is what it is before the very next moment.
    after = np.unique(np.concatenate([one.moments, other.moments]))
    moments = np.unique(np.concatenate([spans[:, 0], after + 1]))
    ahead = one.given_before(moments) - other.given_before(moments)
    first = np.searchsorted(moments, spans[:, 0])
    behind_last = np.searchsorted(moments, spans[:, 1], side="right")
    bounds = np.stack([first, behind_last], axis=1).ravel()
    highest = np.maximum.reduceat(np.append(ahead, ahead[-1]), bounds)[::2]
    lowest = np.minimum.reduceat(np.append(ahead, ahead[-1]), bounds)[::2]
    stretch = int(np.argmax(highest - lowest))
    inside = slice(int(first[stretch]), int(behind_last[stretch]))
    up, down = (inside.start + int(at) for at in (np.argmax(ahead[inside]), np.argmin(ahead[inside])))
    names = (one.name, other.name) if up >= down else (other.name, one.name)
    start, end = ((int(moments[at]) - 1) // 2 for at in sorted((up, down)))
    return ServiceGap(float(highest[stretch] - lowest[stretch]), *names, start, end)
