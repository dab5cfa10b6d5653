"""Driving a server of the OpenAI API, ours or another, with a workload, and measuring it from outside.

`run_bench` sends the requests of a `BenchSpec` and writes a run folder; `result_json` gives the same run under the keys
of `vllm bench serve`. Times are a client's: they include the way to the server and back.
"""

from experiments.bench.result import result_json
from experiments.bench.running import Outcome, Target, prepare, run_bench
from experiments.bench.spec import BenchSpec

__all__ = ["BenchSpec", "Outcome", "Target", "prepare", "result_json", "run_bench"]
