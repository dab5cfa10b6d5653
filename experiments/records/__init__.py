"""Run records: one folder a run, the same from both panels.

    run.json            specification, versions, hardware, git revision
    requests.parquet    one row a request
    steps.parquet       one row a step
    decisions.parquet   one row a decision

A run that a client measured from outside (kind `client`) has requests and, in place of steps and decisions,

    client.parquet      one row a request: when it was due, when its chunks came

`RunWriter` writes it as the run goes, `read_run` reads it, whole or not. The columns stand in `policies.records`,
the client's in `experiments.records.schema`.
"""

from experiments.records.compact import compact_run, write_compact
from experiments.records.environment import describe_environment, run_info
from experiments.records.reader import Run, read_run
from experiments.records.schema import TABLES, RunError
from experiments.records.writer import RunWriter, check_free

__all__ = [
    "TABLES",
    "Run",
    "RunError",
    "RunWriter",
    "check_free",
    "compact_run",
    "describe_environment",
    "read_run",
    "run_info",
    "write_compact",
]
