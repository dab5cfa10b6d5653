"""A request stream made from ServeGen's client statistics:
`timestamp_s,client_id,input_tokens,output_tokens`.

Further columns (`reason_tokens`, the part of the output that is reasoning) are ignored. The client is the
tenant.
"""

from __future__ import annotations

from experiments.workloads.loaders.columns import CsvFormat, unit

FORMAT = CsvFormat(
    "servegen",
    time="timestamp_s",
    clock=unit(1_000_000_000),
    prompt="input_tokens",
    output="output_tokens",
    tenant="client_id",
)
