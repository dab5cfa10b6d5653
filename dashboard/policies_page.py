"""The page "Policies": all runs of a folder in one table, which are worth taking, and whether the panels agree."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pandas as pd
import streamlit as st

from dashboard.picking import readable_runs
from dashboard.policies_figures import capacity_figure, heat_figure, pareto_figure
from dashboard.store import Entry, fingerprint, open_run
from dashboard.ui import downloads, figure, note, plain, select, table, text, verdict
from experiments.compare import format_figure
from experiments.load_curves import load_curves, same_workload
from experiments.records import RunError
from experiments.study import OBJECTIVES, PANELS, agreement, grid, study_row, turned

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import

SHOWN = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_e2el_ms", "fairness", "kv_share")
"""Columns of the table beside the objective."""

KNOBS = 24
"""Knobs among which the first two for the map are looked for."""

FIRST = "output_throughput"
"""Drawn over the load, beside the objective."""

EVERY = "all workloads"


def show(root: Path) -> None:
    """Draw the page for the runs under `root`."""
    readable = readable_runs(root)
    if readable is None:
        return
    rows = _rows(root, [entry for entry in readable if entry.kind in PANELS])
    if not rows:
        st.info(plain(f"There is no real or simulated run in {root} so far: `diptych run`, `diptych simulate`."))
        return
    workloads = sorted({row["workload"] for row in rows})
    most = max(workloads, key=lambda name: _comparable([row for row in rows if row["workload"] == name]))
    left, middle, right = st.columns(3, gap="medium")
    with left:
        workload = select("Workload", "workload", [*workloads, EVERY], most)
    with middle:
        objective = select("Objective", "objective", list(OBJECTIVES), "p99_ttft_ms", lambda o: OBJECTIVES[o].label)
    with right:
        words = text("Only runs with", "only", "words of the policy or the name")
    rows = [row for row in rows if _has(row, words)]
    chosen = [row for row in rows if workload in (EVERY, row["workload"])]
    if not chosen:
        st.info(plain(f"No run of this workload has {words!r} in its policy or name."))
        return
    frame = pd.DataFrame(chosen).drop(columns="knobs")
    for name in OBJECTIVES:
        frame[name] = pd.to_numeric(frame[name])
    _draw_ranking(frame, objective, workload)
    _draw_pareto(frame)
    _draw_capacity(rows, chosen, objective)
    _draw_table(frame, objective)
    _draw_grid(chosen, objective)


def _rows(root: Path, entries: list[Entry]) -> list[dict[str, Any]]:
    """One row a run; those that are broken are named and left out."""
    rows = []
    bar = st.progress(0.0, "Reading the records") if len(entries) > 8 else None
    for place, entry in enumerate(entries):
        try:
            rows.append(_row(str(root), entry.name, fingerprint(root, entry.name)))
        except RunError as error:
            st.warning(plain(f"{entry.name}: {error}"))
        if bar is not None:
            bar.progress((place + 1) / len(entries), f"Reading the records: {place + 1} of {len(entries)}")
    if bar is not None:
        bar.empty()
    return rows


@st.cache_resource(max_entries=5000, show_spinner=False)
def _row(root: str, name: str, fingerprints: object) -> dict[str, Any]:
    return {**study_row(open_run(Path(root), name)), "run": name}


def _draw_ranking(frame: pd.DataFrame, objective: str, workload: str) -> None:
    of = OBJECTIVES[objective]
    best = {}
    for kind, title in PANELS.items():
        rows = frame[frame["kind"] == kind].dropna(subset=[objective])
        if len(rows):
            means = rows.groupby("policy")[objective].mean()
            name = str(means.idxmin() if of.lower_is_better else means.idxmax())
            best[title] = f"{title}: {name} ({format_figure(float(means[name]))} {of.unit})"
    if workload == EVERY:
        verdict("Policies are ranked within one workload: choose one.", False)
        return
    found = agreement(frame, objective)
    first = "; ".join(best.values()) or "no run has it"
    if not len(found.ranking):
        verdict(f"Best by {of.title}: {first}.", True)
        note("No policy ran in both panels, so there is nothing for them to agree on.")
        return
    verdict(f"Best by {of.title}: {first}. {found}.", found.tau is not None and found.same_best)
    cells = [
        (
            str(policy),
            str(row["rank_real"]),
            str(row["rank_sim"]),
            format_figure(row["real"]),
            format_figure(row["sim"]),
        )
        for policy, row in zip(found.ranking.index, found.ranking.astype(object).to_dict("records"), strict=True)
    ]
    headings = ["policy", "rank, real", "rank, simulated", f"{of.label}, real", f"{of.label}, simulated"]
    table(headings, cells)
    downloads("ranking", None, lambda: pd.DataFrame(cells, columns=headings))
    if frame.dropna(subset=[objective]).duplicated(["policy", "kind"]).any():
        note("Where a policy ran several times in one panel, this is the mean of those runs.")


def _draw_pareto(frame: pd.DataFrame) -> None:
    st.header("What no other one beats")

    def on_paper() -> Figure:
        from experiments.study_plots import pareto_figure as drawn  # matplotlib is slow to import

        return drawn(frame)

    alt = "Runs by throughput against latency, fairness and memory; lines join those that no other run beats"
    figure("pareto", pareto_figure(frame), on_paper, lambda: frame, alt)
    note("Fairness is Jain's index of the requests' E2E per output token: 1 where all are served equally fast.")


def _comparable(rows: list[dict[str, Any]]) -> tuple[int, int]:
    """How many policies these runs have in both panels, and in any."""
    real, simulated = ({row["policy"] for row in rows if row["kind"] == kind} for kind in PANELS)
    return len(real & simulated), len(real | simulated)


def _has(row: dict[str, Any], words: str) -> bool:
    """Whether each of the words is in a run's policy or name."""
    return all(word in f"{row['policy']} {row['run']}".lower() for word in words.lower().split())


def _draw_capacity(rows: list[dict[str, Any]], chosen: list[dict[str, Any]], objective: str) -> None:
    """Curves over the load, of all runs whose workload differs from the chosen ones' in the load alone."""
    st.header("Over the load")
    alike = Counter(same_workload(row) for row in chosen).most_common(1)[0][0]
    other = "p99_ttft_ms" if objective == "output_throughput" else objective
    found = {name: load_curves([row for row in rows if same_workload(row) == alike], name) for name in (FIRST, other)}
    curves = {name: frame for name, frame in found.items() if len(frame)}
    if not curves:
        note("No policy was tried at two loads of this workload. With a sweep over the rate there are curves here.")
        return

    def on_paper() -> Figure:
        from experiments.study_plots import capacity_figure as drawn

        return drawn(curves)

    def data() -> pd.DataFrame:
        return pd.concat([frame.assign(objective=name) for name, frame in curves.items()])

    alt = "Throughput and the objective over the load, a line for each policy and panel"
    figure("capacity", capacity_figure(curves), on_paper, data, alt)
    note("Runs that differ in rate, number of requests and seed; where several meet, their mean.")


def _draw_table(frame: pd.DataFrame, objective: str) -> None:
    st.header("All runs")
    of = OBJECTIVES[objective]
    columns = list(dict.fromkeys([objective, *SHOWN]))
    ordered = frame.sort_values([objective, "run"], ascending=[of.lower_is_better, True], kind="stable")
    cells = [
        [row["run"], PANELS[row["kind"]], row["policy"] + (" (clairvoyant)" if row["clairvoyant"] else "")]
        + [format_figure(None if pd.isna(row[name]) else float(row[name])) for name in columns]
        + [f"{row['completed']:,}"]
        for row in ordered.to_dict("records")
    ]
    headings = ["run", "panel", "policy", *(OBJECTIVES[name].label for name in columns), "completed (requests)"]
    table(headings, cells, [f"timeline?{urlencode({'a': run})}" for run in ordered["run"]])
    downloads("runs", None, lambda: ordered)


def _fullest(rows: list[dict[str, Any]], names: list[str], objective: str) -> tuple[str, str] | None:
    """The two knobs over which the map is largest and has fewest holes, two values of each at least; None without."""
    best, most = None, 0.0
    for x, y in combinations(names[:KNOBS], 2):
        pairs = {(row["knobs"].get(x), row["knobs"].get(y)) for row in rows if row[objective] is not None}
        pairs = {(one, other) for one, other in pairs if one is not None and other is not None}
        sides = len({one for one, _ in pairs}), len({other for _, other in pairs})
        if min(sides) > 1 and (worth := len(pairs) ** 2 / (sides[0] * sides[1])) > most:
            best, most = (x, y), worth
    return best


def _draw_grid(rows: list[dict[str, Any]], objective: str) -> None:
    st.header("Over two knobs")
    names = turned(rows)
    pair = _fullest(rows, names, objective)
    if pair is None:
        note(
            "No two knobs were turned over each other in these runs. With a sweep over two of them there is a map here."
        )
        return
    first, second, third = st.columns(3, gap="medium")
    with first:
        x = select("Across", "x", names, pair[0])
    with second:
        others = [name for name in names if name != x]
        y = select("Up", "y", others, pair[1] if pair[1] != x else others[0])
    kinds = [kind for kind in PANELS if any(row["kind"] == kind for row in rows)]
    with third:
        kind = select("Panel", "panel", kinds, kinds[-1], lambda kind: PANELS[kind])
    cells = grid([row for row in rows if row["kind"] == kind], x, y, objective)
    if not cells.size:
        note("No run of this panel has both knobs and this objective.")
        return

    def on_paper() -> Figure:
        from experiments.study_plots import heat_figure as drawn

        return drawn(cells, x, y, objective)

    alt = f"{OBJECTIVES[objective].label} over {x} and {y}"
    figure("knobs", heat_figure(cells, x, y, objective), on_paper, lambda: cells.reset_index(), alt)
    note(f"{OBJECTIVES[objective].label}; darker is better. Where several runs meet it is their mean.")
