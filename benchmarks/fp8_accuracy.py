"""What float8 weights and a float8 KV cache cost in accuracy: `python -m benchmarks.fp8_accuracy [MODEL] [DEVICE]`.

Prints, as a table in Markdown, the mean negative log-likelihood (nats a token) of a fixed English text and its
perplexity. The whole text is one prefill: every key and value is read back from the cache.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from runtime.attention import get_backend
from runtime.forward import ForwardInputs
from runtime.kv_cache import PagedKVCache
from runtime.weights import DEFAULT_MODEL, LoadedModel, load_model

FP8 = torch.float8_e4m3fn
BLOCK_SIZE = 16
CASES: tuple[tuple[str, torch.dtype, str, torch.dtype | None], ...] = (
    ("float32", torch.float32, "none", None),
    ("bfloat16", torch.bfloat16, "none", None),
    ("bfloat16, fp8 KV cache", torch.bfloat16, "none", FP8),
    ("bfloat16, fp8 weights", torch.bfloat16, "fp8", None),
    ("bfloat16, fp8 weights and KV cache", torch.bfloat16, "fp8", FP8),
)
"""Name, dtype, quantization, type of the KV cache."""

TEXT = """\
The harbour of a small town is a good place to learn how work is shared out. Boats come in when the tide and the
weather let them, and not when it would suit the people on the quay. There are four cranes, and a boat needs one of
them for as long as its load is heavy: a trawler with a poor catch is empty within ten minutes, a freighter with timber
may take the whole afternoon. Who is served first? The oldest rule is that boats are served in the order in which they
arrive. Nobody argues with it, because everybody can see that it is fair. But when a freighter has come in just before
six fishing boats, the fish of all six spoils in the sun while the timber, which could have waited for a week, is lifted
out plank by plank. So the harbour master of this town, a patient woman who had studied mathematics before she inherited
her father's office, tried another rule. She looked at each boat through her telescope, guessed how long it would take,
and called the shortest job first. The queue became much shorter on average, and the fishermen bought her a drink. Then
the captain of the freighter came to see her. He had been waiting for three days. Every morning he was told that he was
next, and every morning a few small boats came round the headland and went ahead of him. He was not angry, he said, but
he would like to know whether he should send his crew home for the winter. She thought about it overnight and came back
with a third rule. A crane would work for one hour on any boat, and then, if others were waiting, the boat had to move
aside and join the end of the line. Moving aside cost time as well, since ropes had to be untied and tied again, and the
men on the cranes complained that they spent half of the day with ropes. When the hour was made longer there were fewer
complaints about ropes and more about fish. In the end she kept a notebook, in which she wrote down how long each boat
had waited and how long it had been served, and every evening she added up the columns. The rule that she finally wrote
on the board outside her office had only two sentences, and strangers often asked her who had invented it. Nobody, she
answered; it is what was left after everything else had been tried.
"""


@torch.inference_mode()
def mean_nll(loaded: LoadedModel, token_ids: Sequence[int], kv_dtype: torch.dtype | None = None) -> float:
    """Mean negative log-likelihood of all tokens but the first, in nats."""
    model, n = loaded.model, len(token_ids)
    num_blocks = -(-n // BLOCK_SIZE)
    cache = PagedKVCache(loaded.config, num_blocks, BLOCK_SIZE, dtype=kv_dtype or model.dtype, device=model.device)
    model.attach(cache, get_backend("auto", model.device))
    ids = torch.tensor(token_ids, device=model.device)
    positions = torch.arange(n, device=model.device)
    hidden = model.forward(
        ForwardInputs(
            input_ids=ids,
            positions=positions,
            slot_mapping=positions,
            query_start_loc=torch.tensor([0, n], dtype=torch.int32, device=model.device),
            seq_lens=torch.tensor([n], dtype=torch.int32, device=model.device),
            block_table=torch.arange(num_blocks, dtype=torch.int32, device=model.device)[None],
            host_query_lens=[n],
            host_seq_lens=[n],
        )
    )
    nll = F.cross_entropy(model.logits(hidden[:-1]).float(), ids[1:])
    model.detach(cache)
    return float(nll)


def main() -> None:
    source, device = [*sys.argv[1:], *(DEFAULT_MODEL, "cpu")[len(sys.argv) - 1 :]]
    text = " ".join(TEXT.split())
    print("| weights and cache | nats a token | perplexity | against bfloat16 |\n| --- | --- | --- | --- |")
    rows: list[tuple[str, float]] = []
    for name, dtype, quantization, kv_dtype in CASES:
        loaded = load_model(source, dtype=dtype, device=device, quantization=quantization)
        if loaded.tokenizer is None:
            raise SystemExit(f"{source} has no tokenizer, and the text needs one; name another model")
        token_ids = loaded.tokenizer.encode(text)
        rows.append((name, mean_nll(loaded, token_ids, kv_dtype)))
    base = dict(rows)["bfloat16"]
    for name, nll in rows:
        print(f"| {name} | {nll:.4f} | {math.exp(nll):.3f} | {100 * math.expm1(nll - base):+.2f}% |")
    print(f"\n{source}, {len(token_ids)} tokens, on {device}")


if __name__ == "__main__":
    main()
