"""The page "Try": describe a simulation, watch it run, and keep it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from dashboard.figures import latency_figure
from dashboard.job import Job
from dashboard.timeline_figures import timeline_figure
from dashboard.ui import figure, note, number, open_select, plain, select, tiles, value_tile
from experiments.command_line import as_text, simulate_command
from experiments.compare import format_figure
from experiments.composition import composition
from experiments.metrics import per_request, summarize
from experiments.records import Run, RunError, read_run
from experiments.series import LATENCY_COLUMNS
from experiments.simulated import make_costs, make_router, simulated_limits
from experiments.spec import CostSpec, PoliciesSpec, RunSpec, SpecError, check_spec
from experiments.timeline import states
from experiments.workloads.spec import GENERATORS
from policies import model_shape, registry
from simulator.devices import DEVICES

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import

MOST = 200_000
"""Requests of one simulation; more are for the command line."""

_FIGURES = (
    ("output_throughput", "Output tokens", "tok/s"),
    ("median_ttft_ms", "TTFT p50", "ms"),
    ("p99_ttft_ms", "TTFT p99", "ms"),
    ("median_tpot_ms", "TPOT p50", "ms"),
    ("median_e2el_ms", "E2E p50", "ms"),
)


def show(root: Path) -> None:
    """Draw the page; what is kept goes into a new folder of `root`."""
    content = _form()
    spec, error = _checked(content)
    st.caption("The same, as a command")
    if spec is None:
        st.error(plain(error))
    else:
        st.code(as_text(simulate_command(spec)), language="bash")
    job: Job | None = st.session_state.get("job")
    running = job is not None and job.running
    with st.container(horizontal=True, key="actions"):
        start = st.button("Simulate", type="primary", icon=":material/play_arrow:", disabled=spec is None or running)
        if st.button("Cancel", icon=":material/stop:", disabled=not running) and job is not None:
            job.cancel()
            st.rerun()
    if start and spec is not None:
        if job is not None:
            job.discard()
        st.session_state["job"] = Job(spec)
        st.rerun()
    if job is None:
        note("Nothing is simulated yet. It runs in a process of its own, and leaves nothing behind unless you save it.")
    elif running:
        _watch()
    else:
        _draw_end(root, job)


def _form() -> dict[str, Any]:
    """What the fields say, as the content of a specification."""
    workload, machine, policies = st.columns([3, 3, 4], gap="large")
    stack = PoliciesSpec()
    roles: dict[str, str] = {}
    with workload:
        st.header("Workload")
        name = select("Lengths and arrivals of", "workload", sorted(GENERATORS), "chat")
        left, right = st.columns(2)
        with left:
            n = number("Requests", "n", 500, 1, MOST, 1)
            seed = number("Seed", "seed", 0, 0, 2**31 - 1, 1)
        with right:
            rate = number("Rate (requests a second)", "rate", 8.0, 1e-3, 1e5, 0.5)
            replicas = number("Replicas", "replicas", 1, 1, 256, 1)
    with machine:
        st.header("Model and device")
        model = select("Model shape", "model", list(model_shape.PRESETS), "llama-3.1-8b")
        left, right = st.columns(2)
        with left:
            device = select("Device", "device", list(DEVICES), "h100-sxm")
            seqs = number("Running requests, at most", "seqs", 256, 1, 65_536, 16)
        with right:
            dtype = select("Data type", "dtype", ["bfloat16", "float16", "float32"], "bfloat16")
            tokens = number("Tokens a step, at most", "tokens", 2048, 1, 1_000_000, 256)
    with policies:
        st.header("Policies")
        left, right = st.columns(2)
        for place, role in enumerate(("scheduler", "queue", "admission", "preemption", "eviction", "router")):
            with (left, right)[place % 2]:
                hint = "By name, and with knobs as in sarathi,chunk_size=256"
                roles[role] = open_select(role.capitalize(), role, registry.names(role), getattr(stack, role), hint)
    return {
        "target": "sim",
        "workload": {"name": name, "n": int(n), "rate": float(rate), "seed": int(seed)},
        "seed": int(seed),
        "replicas": int(replicas),
        "cost": {"model": model, "device": device, "dtype": dtype},
        "limits": {"max_num_seqs": int(seqs), "max_num_batched_tokens": int(tokens)},
        "policies": roles,
    }


def _checked(content: dict[str, Any]) -> tuple[RunSpec | None, str]:
    """The specification, or what is wrong with it in one line."""
    foreign = [text for text in content["policies"].values() if ":" in text.split(",")[0]]
    if foreign:
        return None, f"{foreign[0]}: policies of your own are tried on the command line, with diptych simulate"
    try:
        spec = check_spec(content, "the form")
        costs = make_costs(spec.cost or CostSpec())
        limits = simulated_limits(spec, costs)
        spec.policies.stack.build(block_size=limits.block_size, oracle={}, future={})
        make_router(spec, costs, limits)
    except (SpecError, ValueError) as error:
        return None, str(error)
    return spec, ""


@st.fragment(run_every=2.0)
def _watch() -> None:
    """Progress and what is recorded so far, until it ends."""
    job: Job | None = st.session_state.get("job")
    if job is None or not job.running:
        st.rerun()
        return
    ended, total = job.progress
    text = f"{ended:,} of {total:,} requests have ended" if total else "Making the workload"
    st.progress(min(1.0, ended / total) if total else 0.0, text)
    try:
        run = read_run(job.folder)
        if len(run.steps):
            _draw_run(run, "partial")
    except (RunError, OSError):  # not a file yet, or parts are being joined just now
        return


def _draw_end(root: Path, job: Job) -> None:
    if job.error:
        st.error(plain(f"The simulation failed: {job.error}"))
        return
    try:
        run = read_run(job.folder)
    except RunError:
        st.info("Cancelled before anything was recorded.")
        return
    if job.cancelled:
        ended, total = job.progress
        st.info(f"Cancelled: {ended:,} of {total:,} requests had ended. What was recorded until then is shown.")
    elif len(refused := run.requests[run.requests["status"] == "refused"]):
        st.warning(plain(f"{len(refused)} of {len(run.requests)} requests were refused: {refused['error'].iloc[0]}"))
    _draw_run(run, "whole")
    _draw_save(root, job)


def _draw_run(run: Run, key: str) -> None:
    if key == "whole":
        summary = summarize(run)
        below = f"{summary['completed']:,} requests completed"
        tiles([value_tile(f"{name} ({unit})", format_figure(summary[k]), below) for k, name, unit in _FIGURES])
    frame, label = per_request(run), "simulated"
    end = max(1, int(run.steps["end_ns"].max()))
    steps = {label: composition(run, 0, end)}
    over_time = {label: states(run)}

    def states_on_paper() -> Figure:
        from experiments.timeline_plots import timeline_figure as drawn  # matplotlib is slow to import

        return drawn(steps, over_time)

    def latencies_on_paper() -> Figure:
        from experiments.plots import latency_figure as drawn

        return drawn({label: frame})

    def latencies() -> pd.DataFrame:
        return frame[["request_id", "status", *LATENCY_COLUMNS]]

    drawn = timeline_figure(steps, over_time, 0.0, end / 1e9)
    figure(f"try-states-{key}", drawn, states_on_paper, lambda: steps[label], "What the device did, queues and memory")
    alt = "Distribution functions of TTFT, TPOT and E2E of the requests that have ended"
    figure(f"try-latency-{key}", latency_figure({label: frame}), latencies_on_paper, latencies, alt)


def _draw_save(root: Path, job: Job) -> None:
    with st.container(horizontal=True, vertical_alignment="bottom", key="save"):
        scheduler = job.spec.policies.scheduler.split(",")[0]
        name = st.text_input("Save as", f"{job.spec.workload.name}-{scheduler}-sim", key="save-as", width=320)
        if st.button("Save", icon=":material/save:"):
            try:
                saved = job.save(root, name.strip())
            except (ValueError, OSError) as error:
                st.error(plain(str(error)))
            else:
                st.success(plain(f"Saved as {saved.name}. It is among the runs of the other pages now."))
