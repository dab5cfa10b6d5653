"""The Chatbot Arena log of the VTC authors (OSDI 2024): `req_id,adapter_dir,prompt_len,output_len,req_time`
(s).

`adapter_dir` names the client.
"""

from __future__ import annotations

from experiments.workloads.loaders.columns import CsvFormat, unit

FORMAT = CsvFormat(
    "vtc_arena",
    time="req_time",
    clock=unit(1_000_000_000),
    prompt="prompt_len",
    output="output_len",
    tenant="adapter_dir",
)
