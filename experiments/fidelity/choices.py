"""What a user would decide by the simulation, and what that would cost: level 4.

Capacity under an SLO is where the line between two measured loads crosses the objective: the largest load up to which
every objective is met. A ranking counts pairs of policies that are further apart in the real panel than its noise:
than the largest difference between repeats of a cell, and than the half width of a 95% paired bootstrap over the
requests; one that the simulation puts the other way round counts against it, and one that it cannot tell apart counts
as nothing: Kendall's tau over the pairs that there is something to say of. Regret is how much worse the policy that the
simulation puts first is in the real panel than the one that is best there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

SLO = {"p99_ttft": 2000.0, "p99_tpot": 50.0}
"""Figure -> milliseconds that it may not pass."""
RANKED = {"mean_ttft": True, "p99_ttft": True, "mean_e2el": True, "p99_tpot": True}
"""Figures that policies are ranked by; True: lower is better."""
FLOOR_UNKNOWN = 0.02
"""Relative noise where no cell of the workload was repeated."""


def slo_capacity(loads: Sequence[tuple[float, Mapping[str, float | None]]]) -> float | None:
    """The largest rate that meets SLO, from (rate, figures) in ascending order, linear in between.

    None where the lowest rate misses it; infinity where none of them does.
    """
    first_miss: float | None = None
    for figure, limit in SLO.items():
        points = [(rate, value) for rate, figures in loads if (value := figures.get(figure)) is not None]
        crossing = _crossing(points, limit)
        if crossing is None:
            return None
        first_miss = crossing if first_miss is None else min(first_miss, crossing)
    return first_miss


def _crossing(points: Sequence[tuple[float, float]], limit: float) -> float | None:
    if not points or points[0][1] > limit:
        return None
    for (low, below), (high, above) in pairwise(points):
        if above > limit:
            return low + (high - low) * (limit - below) / (above - below)
    return float("inf")


def tau(
    pairs: Mapping[str, tuple[float, float]], floor: float, widths: Mapping[tuple[str, str], float]
) -> tuple[float | None, int]:
    """Kendall's tau of policy -> (real, simulated), and the number of pairs that the real panel tells apart.

    Two figures are the same whose relative difference is at most `floor`, or whose difference is at most the `widths`
    of their policies, in the figures' unit. None where no pair is apart.
    """
    total = agreeing = 0
    for one, two in combinations(pairs, 2):
        width = widths.get((one, two), widths.get((two, one), 0.0))
        real, simulated = (_order(pairs[one][i], pairs[two][i], floor, width) for i in (0, 1))
        if real:
            total += 1
            agreeing += real * simulated
    return (agreeing / total if total else None), total


def _order(a: float, b: float, floor: float, width: float) -> int:
    if abs(a - b) <= max(floor * min(abs(a), abs(b)), width):
        return 0
    return 1 if a > b else -1


def regret(pairs: Mapping[str, tuple[float, float]]) -> float:
    """How much worse, relatively, the simulation's choice is than the best one; lower figures are better."""
    chosen = min(pairs, key=lambda policy: pairs[policy][1])
    best = min(real for real, _ in pairs.values())
    return (pairs[chosen][0] - best) / best if best else 0.0


def decided(found: Mapping[str, Any]) -> dict[str, Any]:
    """Level 4 of what `sim_half.evaluate` found: capacities by workload and policy, rankings by workload and load."""
    cells = [cell for cell in found["cells"].values() if cell["load"] is not None and cell["repeat"] == 0]
    capacities = []
    for work, policy in sorted({(cell["work"], cell["policy"]) for cell in cells}):
        ladder = sorted(
            (cell for cell in cells if (cell["work"], cell["policy"]) == (work, policy)), key=lambda c: c["load"]
        )
        if len(ladder) < 2:
            continue
        unit = found["capacities"][work]
        real, simulated = (
            slo_capacity(
                [(cell["load"] * unit, {name: pair[i] for name, pair in cell["figures"].items()}) for cell in ladder]
            )
            for i in (0, 1)
        )
        capacities.append(
            {
                "work": work,
                "policy": policy,
                "loads": [cell["load"] for cell in ladder],
                "real": _finite(real),
                "sim": _finite(simulated),
                "real_above": real == float("inf"),
                "sim_above": simulated == float("inf"),
            }
        )
    rankings = []
    for work, load in sorted({(cell["work"], cell["load"]) for cell in cells}):
        here = [cell for cell in cells if (cell["work"], cell["load"]) == (work, load)]
        if len(here) < 3:
            continue
        for figure in RANKED:
            pairs = {
                cell["policy"]: tuple(cell["figures"][figure]) for cell in here if None not in cell["figures"][figure]
            }
            if not pairs:
                continue
            floor = _floor_of(found, work, figure)
            noise = found["noise"].get(f"{work}~{load:g}~{figure}", ())
            widths = {(one, two): float("inf") if width is None else width for one, two, width in noise}
            value, count = tau(pairs, floor, widths)
            rankings.append(
                {
                    "work": work,
                    "load": load,
                    "figure": figure,
                    "policies": len(pairs),
                    "floor": floor,
                    "pairs": count,
                    "tau": value,
                    "regret": regret(pairs),
                }
            )
    return {"capacities": capacities, "rankings": rankings}


def _finite(value: float | None) -> float | None:
    return None if value is None or value == float("inf") else value


def _floor_of(found: Mapping[str, Any], work: str, figure: str) -> float:
    """The largest noise of a workload's repeated cells in a figure."""
    floors = [
        cell["floor"][figure] for cell in found["cells"].values() if cell["work"] == work and cell["floor"] is not None
    ]
    return max(floors, default=FLOOR_UNKNOWN)
