"""Workloads: requests to run, from public traces or from generators.

`make_workload(WorkloadSpec(name="chat", n=1000, rate=4.0))` or `load("trace.jsonl.gz")` give a `Workload`;
`prompt_token_ids` gives its prompts as tokens for the real panel, `block_keys` its prefix keys for the
simulated one.
"""

from experiments.workloads.block_keys import block_keys
from experiments.workloads.errors import TraceError
from experiments.workloads.loaders import FORMATS, load
from experiments.workloads.request import Workload
from experiments.workloads.spec import GENERATORS, WorkloadSpec, make_workload
from experiments.workloads.text import measure_texts, prompt_token_ids

__all__ = [
    "FORMATS",
    "GENERATORS",
    "TraceError",
    "Workload",
    "WorkloadSpec",
    "block_keys",
    "load",
    "make_workload",
    "measure_texts",
    "prompt_token_ids",
]
