"""What a client saw of a request, as rows of a run's records."""

from __future__ import annotations

from experiments.bench.measuring import Measured
from experiments.bench.prompts import cap_of
from experiments.bench.spec import BenchSpec
from experiments.coming import request_details
from experiments.workloads import Workload
from policies.request import Slo


def rows(measured: Measured, workload: Workload, spec: BenchSpec) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """A request's rows of requests.parquet and client.parquet; what only a panel knows is empty."""
    i, usage = measured.request_id, measured.usage
    details = request_details(workload, i)
    slo = details.slo or Slo()
    row = {
        "request_id": i,
        "replica": 0,
        "arrival_ns": measured.sent_ns,
        "before_step": -1,
        "tenant": details.tenant,
        "session": details.session,
        "program": details.program,
        "parents": [],
        "priority": details.priority,
        "slo_ttft_ns": slo.ttft_ns,
        "slo_tpot_ns": slo.tpot_ns,
        "slo_e2e_ns": slo.e2e_ns,
        "slo_value": slo.value if details.slo else None,
        "slo_droppable": slo.droppable,
        "hints": list(details.hints.items()),
        "prompt_tokens": usage.prompt_tokens if usage else int(workload.prompt_tokens[i]),
        "max_tokens": cap_of(workload, spec, i),
        "output_tokens": measured.output_tokens,
        "cached_tokens": (usage.cached_tokens or 0) if usage else 0,
        "preemptions": 0,
        "first_scheduled_ns": None,
        "first_token_ns": measured.chunk_ns[0] if measured.chunk_ns else None,
        "finish_ns": measured.end_ns,
        "end_before_step": None,
        "status": measured.status,
        "error": measured.error,
        "token_steps": [],
        "decode_runs": [],
        "block_keys": [],
        "moves": [],
        "fetched_tokens": 0,
        "disk_tokens": 0,
    }
    return tuple(row.values()), (i, measured.due_ns, measured.chunk_ns)
