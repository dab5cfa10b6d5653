"""What validation found, as Markdown: the tables of docs/fidelity.md, and what the command prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.attribution import QUEUEING, TERMS
from experiments.compare import TITLES
from experiments.fidelity.choices import decided
from experiments.fidelity.sim_half import FIGURES

TARGETS = {
    "output_throughput": 0.01,
    "mean_ttft": 0.05,
    "p99_ttft": 0.08,
    "mean_tpot": 0.015,
    "p99_tpot": 0.04,
    "mean_e2el": 0.02,
    "p99_e2el": 0.04,
}
"""Figure -> relative error that is aimed at."""
STEP_MEAN, STEP_P90 = 0.02, 0.05
TAU, REGRET, CAPACITY = 0.95, 0.01, 0.02


def markdown(found: Mapping[str, Any]) -> str:
    """Every level, and below them what failed."""
    lines: list[str] = []
    for part in (_origin, _decisions, _steps, _host, _free, _attribution, _capacities, _rankings, _failed):
        lines += part(found)
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return ["", *(f"| {' | '.join(row)} |" for row in (head, rule, *rows)), ""]


def _cells(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(title, cell) in the order of the tables."""
    cells = found["cells"].values()
    ranked = sorted(
        cells, key=lambda c: (c["work"], -1.0 if c["load"] is None else c["load"], c["policy"], c["repeat"])
    )
    return [(_title(cell), cell) for cell in ranked]


def _title(cell: Mapping[str, Any]) -> str:
    load = "all at once" if cell["load"] is None else f"{cell['load']:.0%}"
    return f"{cell['work']}, {load}, {cell['policy']}" + (f", again ({cell['repeat']})" if cell["repeat"] else "")


def _origin(found: Mapping[str, Any]) -> Iterator[str]:
    for name, calibration in found["calibrations"].items():
        about = calibration["provenance"]
        gpus = [gpu["name"] for gpu in about.get("hardware", {}).get("gpus", [])] or [about["hardware"].get("cpu", "")]
        yield f"{about['model']} in {about['dtype']} on {', '.join(gpus)} ({name}), {about.get('started_at', '')}"
    yield ""
    yield (
        "Loads are shares of sustained capacity: requests/s that end while somebody waits, all having come at once, "
        "after as many have ended as run at once. A workload has the same requests at every load."
    )
    rows = []
    for title, cell in _cells(found):
        if cell["sustained"] is not None:
            real, simulated = cell["sustained"]
            rows.append(
                [title, f"{cell['requests']:,}", f"{real:.2f}", f"{simulated:.2f}", f"{simulated / real - 1:+.1%}"]
            )
    yield from _table(["run", "requests", "capacity, req/s", "simulated", "error"], rows)


def _decisions(found: Mapping[str, Any]) -> Iterator[str]:
    cells = _cells(found)
    same = sum(cell["decisions"]["identical"] for _, cell in cells)
    steps = sum(cell["decisions"]["steps"] for _, cell in cells)
    yield ""
    yield "#### 1. Decisions replayed"
    yield ""
    yield f"{same} of {len(cells)} runs decided alike in every one of {steps:,} steps."
    for title, cell in cells:
        if not cell["decisions"]["identical"]:
            yield f"- MISS {title}: {cell['decisions']['different']} of {cell['decisions']['steps']} steps differ"


def _steps(found: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"#### 2. Step times, given the real plans (targets: mean {STEP_MEAN:.0%}, p90 {STEP_P90:.0%})"
    rows = []
    for title, cell in _cells(found):
        for clock in ("device", "step"):
            for kind, error in cell["steps"][clock].items():
                if kind == "all":
                    miss = error["mean"] > STEP_MEAN or error["p90"] > STEP_P90
                    rows.append([title, clock, *_step_cells(error), "MISS" if miss else "pass"])
    head = ["run", "clock", "steps", "ms", "mean error", "p90", "bias", "outside", ""]
    yield from _table(head, rows, left=2)
    yield "By kind of step, over all runs (steps' errors weighted by their number):"
    rows = []
    for clock in ("device", "step"):
        by_kind: dict[str, list[Mapping[str, float]]] = {}
        for _, cell in _cells(found):
            for kind, error in cell["steps"][clock].items():
                by_kind.setdefault(kind, []).append(error)
        rows += [[kind, clock, *_step_cells(_pooled(errors))] for kind, errors in sorted(by_kind.items())]
    yield from _table(["kind", "clock", "steps", "ms", "mean error", "p90 (mean)", "bias", "outside"], rows, left=2)


def _step_cells(error: Mapping[str, float]) -> list[str]:
    return [
        f"{error['num_steps']:,}",
        f"{error['measured_ms']:.2f}",
        f"{error['mean']:.1%}",
        f"{error['p90']:.1%}",
        f"{error['bias']:+.1%}",
        f"{error['outside']:.1%}",
    ]


def _pooled(errors: Sequence[Mapping[str, float]]) -> dict[str, float]:
    count = sum(error["num_steps"] for error in errors)
    time = sum(error["num_steps"] * error["measured_ms"] for error in errors)

    def mean(name: str) -> float:
        return sum(error["num_steps"] * error[name] for error in errors) / count

    bias = sum(error["num_steps"] * error["measured_ms"] * error["bias"] for error in errors) / time
    found = {name: mean(name) for name in ("measured_ms", "mean", "p90", "outside")}
    return {**found, "num_steps": count, "bias": bias}


def _host(found: Mapping[str, Any]) -> Iterator[str]:
    yield "The host's two parts, mean microseconds a step (predicted, measured):"
    rows = []
    for title, cell in _cells(found):
        host = cell["steps"]["host"]
        pairs = [host.get(part) for part in ("prepare_us", "finish_us")]
        rows.append([title, *(text for pair in pairs for text in (["–"] * 2 if pair is None else _microseconds(pair)))])
    yield from _table(["run", "prepare", "measured", "finish", "measured"], rows)


def _microseconds(pair: Sequence[float]) -> list[str]:
    return [f"{value:,.0f}" for value in pair]


def _free(found: Mapping[str, Any]) -> Iterator[str]:
    yield "#### 3. Free-running: simulated beside real"
    yield ""
    yield (
        "Signed relative error, with the target beside each figure's name. `=`: within the noise floor, that is the "
        "largest difference of the run's own repeats: indistinguishable. MISS: beyond target and floor."
    )
    head = ["run", *(f"{name} ({TARGETS[key]:.1%})" for key, name in FIGURES.items()), "preemptions real, sim"]
    rows = []
    for title, cell in _cells(found):
        preemptions = ", ".join("–" if count is None else str(count) for count in cell["preemptions"])
        rows.append([title, *(_error(cell, key) for key in FIGURES), preemptions])
    yield from _table(head, rows)
    counts = {key: _met(found, key) for key in FIGURES}
    total = len(found["cells"])
    yield (
        "Within target or floor: " + ", ".join(f"{FIGURES[key]} {met} of {total}" for key, met in counts.items()) + "."
    )
    yield ""


def _attribution(found: Mapping[str, Any]) -> Iterator[str]:
    cells = _cells(found)
    named = {name for _, cell in cells for parts in cell["attribution"].values() for name in parts}
    heads = [name for name in (*TERMS, QUEUEING) if name in named]
    yield "What the errors of the means come from, in percents of the real mean: of the steps, given the real plans, by"
    yield "term; beyond that other plans, which is queueing."
    rows = []
    for title, cell in cells:
        for latency, parts in cell["attribution"].items():
            texts = (f"{parts[name]:+.1%}" if name in parts else "–" for name in ("error", *heads))
            rows.append([title, TITLES[latency], *texts])
    yield from _table(["run", "mean", "error", *heads], rows, left=2)


def relative_error(cell: Mapping[str, Any], key: str) -> float | None:
    """Of a figure of one cell, (simulated - real) / real."""
    real, simulated = cell["figures"][key]
    return None if not real or simulated is None else (simulated - real) / real


def missed(found: Mapping[str, Any]) -> int:
    """How many figures miss their targets: cells that decide otherwise, free-running figures, cells that failed."""
    cells = found["cells"].values()
    decisions = sum(not cell["decisions"]["identical"] for cell in cells)
    figures = sum(
        (error := relative_error(cell, key)) is not None and abs(error) > _bound(cell, key)
        for cell in cells
        for key in FIGURES
    )
    return decisions + figures + len(found["failed"])


def _met(found: Mapping[str, Any], key: str) -> int:
    errors = [(cell, relative_error(cell, key)) for cell in found["cells"].values()]
    return sum(error is not None and abs(error) <= _bound(cell, key) for cell, error in errors)


def _bound(cell: Mapping[str, Any], key: str) -> float:
    return max(TARGETS[key], (cell["floor"] or {}).get(key, 0.0))


def _error(cell: Mapping[str, Any], key: str) -> str:
    error = relative_error(cell, key)
    if error is None:
        return "–"
    floor = (cell["floor"] or {}).get(key)
    beside = "" if floor is None else f" (floor {floor:.1%})"
    mark = " =" if floor is not None and abs(error) <= floor else " MISS" if abs(error) > _bound(cell, key) else ""
    return f"{error:+.1%}{beside}{mark}"


def _capacities(found: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for one in decided(found)["capacities"]:
        texts = [_rate(one, panel) for panel in ("real", "sim")]
        error = "–"
        if one["real"] and one["sim"]:
            value = one["sim"] / one["real"] - 1
            error = f"{value:+.1%}" + (" MISS" if abs(value) > CAPACITY else "")
        loads = ", ".join(f"{load:.0%}" for load in one["loads"])
        rows.append([one["work"], one["policy"], loads, *texts, error])
    yield "#### 4. What users decide"
    if rows:
        yield ""
        yield f"Capacity in requests/s under TTFT p99 2 s and TPOT p99 50 ms (target {CAPACITY:.0%}):"
        yield from _table(["workload", "policy", "loads", "real", "simulated", "error"], rows, left=3)


def _rate(one: Mapping[str, Any], panel: str) -> str:
    if one[f"{panel}_above"]:
        return "above all"
    return "below all" if one[panel] is None else f"{one[panel]:.2f}"


def _rankings(found: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for one in decided(found)["rankings"]:
        tau = "–" if one["tau"] is None else f"{one['tau']:+.2f}"
        miss = (one["tau"] is not None and one["tau"] < TAU) or one["regret"] > REGRET
        rows.append([
            f"{one['work']}, {one['load']:.0%}", FIGURES[one["figure"]], str(one["policies"]), f"{one['floor']:.1%}",
            str(one["pairs"]), tau, f"{one['regret']:.1%}", "MISS" if miss else "pass",
        ])  # fmt: skip
    if rows:
        yield ""
        yield (
            f"Ranking of policies (targets: tau {TAU}, regret {REGRET:.0%}). Two tie unless they differ by more than "
            "the noise floor (the largest difference between repeats) and than half the width of a 95% paired "
            "bootstrap over the requests:"
        )
        head = ["cell", "by", "policies", "noise floor", "pairs apart", "tau", "regret", ""]
        yield from _table(head, rows, left=2)


def _failed(found: Mapping[str, Any]) -> Iterator[str]:
    for name, reason in found["failed"].items():
        yield f"- MISS {name}: {reason}"
