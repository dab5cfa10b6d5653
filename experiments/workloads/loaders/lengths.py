"""Files of token lengths: Vidur and Etalon, ShareGPT V3 turns, and the LMSYS sample of APEX.

- Vidur (MLSys 2024), Etalon: `num_prefill_tokens,num_decode_tokens,...`; no arrival times.
- ShareGPT V3 turns: `conv,turn,new_prompt_tokens,context_tokens,output_tokens`; no arrival times. The
  prompt is `context_tokens`: history plus new prompt.
- APEX: `StartTimeOffset` (ns), `ContextTokens`, `GeneratedTokens`.
"""

from __future__ import annotations

from experiments.workloads.loaders.columns import CsvFormat, unit

VIDUR = CsvFormat("vidur_lengths", prompt="num_prefill_tokens", output="num_decode_tokens")
SHAREGPT_TURNS = CsvFormat(
    "sharegpt_turns", prompt="context_tokens", output="output_tokens", session="conv", turn="turn"
)
APEX = CsvFormat("apex", time="StartTimeOffset", clock=unit(1), prompt="ContextTokens", output="GeneratedTokens")
