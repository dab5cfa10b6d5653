"""What the measured figures are held against: vLLM's on the same card, targets, and what the hardware allows.

Source of vLLM's figures: vLLM 0.24.0 on one H100 80GB HBM3, PyTorch 2.11.0+cu130, November 2026; random weights, bf16,
FlashAttention 3, default compilation and CUDA graphs, prefix caching off, `max_model_len` 4096, `max_num_seqs` 256,
`max_num_batched_tokens` 8192 (online 2048), greedy, `ignore_eos`, no detokenising, random token ids as prompts, one
generate call timed from outside.

Floors, of what the same card does at its best: 3.11 TB/s read and 789 TFLOP/s in bf16. A decode step reads the weights
and the KV cache of the batch once. A prefill multiplies by every weight of a layer and attends. The offline works do
both: the KV cache of every output token, the weights once a step (as many steps as the longest output needs, or 256
outputs at a time), and the prompts' products.
"""

from __future__ import annotations

from dataclasses import dataclass

VLLM = "vLLM 0.24.0"
MODELS = ("llama-3.1-8b", "qwen3-0.6b")
ONLINE_MODELS = ("llama-3.1-8b",)

DEVICE_BYTES_PER_MS = 3.11e9
MEAN_CONTEXT = 576  # of a decode step from 512 to 640 tokens
WEIGHTS_MS = {"llama-3.1-8b": 4.83, "qwen3-0.6b": 0.38}
KV_BYTES_PER_TOKEN = {"llama-3.1-8b": 131_072, "qwen3-0.6b": 114_688}
FLOPS_PER_MS = 7.89e11
LAYER_WEIGHTS = {"llama-3.1-8b": 6.979e9, "qwen3-0.6b": 0.440e9}  # in products, LM head left out
ATTENTION_WIDTH = {"llama-3.1-8b": 32 * 32 * 128, "qwen3-0.6b": 28 * 16 * 128}  # layers x heads x head dimension
_OFFLINE_FLOOR_TOK_S = {"llama-3.1-8b": 10_806.0, "qwen3-0.6b": 26_338.0}
_AZURE_FLOORS = {"llama-3.1-8b": (7_298.0, 29.5), "qwen3-0.6b": (20_840.0, 84.3)}  # output tokens/s, requests/s


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure by its key in a result, and what it is compared with."""

    key: str
    label: str
    unit: str
    vllm: float | None = None
    target: float | None = None
    floor: float | None = None
    higher_is_better: bool = False

    def ratio(self, ours: float) -> float | None:
        """How many times better than vLLM: above 1 is better, whichever way the figure goes."""
        if self.vllm is None or ours <= 0:
            return None
        return ours / self.vllm if self.higher_is_better else self.vllm / ours

    def meets_target(self, ours: float) -> bool | None:
        """None where there is no target."""
        if self.target is None:
            return None
        return ours >= self.target if self.higher_is_better else ours <= self.target


BATCHES = (1, 8, 32, 64, 128, 256)
_DECODE = {
    "llama-3.1-8b": (6.46, 6.75, 7.52, 8.43, 10.98, 15.88),
    "qwen3-0.6b": (2.66, 2.29, 2.64, 3.70, 5.23, 9.60),
}
_DECODE_TARGETS = {
    "llama-3.1-8b": {1: 5.9, 32: 7.0, 256: 14.6},
    "qwen3-0.6b": {1: 1.3, 64: 2.6, 256: 7.8},
}
_PREFILL = {  # 1 x 512 ms, 1 x 2048 ms, 32 x 2048 tokens/s
    "llama-3.1-8b": (17.1, 50.8, 43_231.0),
    "qwen3-0.6b": (15.5, 35.3, 231_970.0),
}
_PREFILL_TARGETS = {"llama-3.1-8b": 45.0}
_OFFLINE = {  # offline256 output tokens/s; Azure output tokens/s and requests/s; start in s
    "llama-3.1-8b": (8_376.0, 5_229.0, 21.1, 104.0),
    "qwen3-0.6b": (18_234.0, 11_650.0, 47.1, 122.0),
}
_OFFLINE_TARGETS: dict[str, tuple[float, float, float | None]] = {  # offline256, Azure requests/s, start
    "llama-3.1-8b": (9_300.0, 23.5, 30.0),
    "qwen3-0.6b": (25_000.0, 70.0, None),
}
IDLE_TARGET_PERCENT = 3.0
PERCENTILES = (50, 90, 99)
_ONLINE: dict[int, dict[str, tuple[float, ...]]] = {  # requests/s: latencies at p50, p90 and p99 in ms
    6: {"ttft": (40.8, 77.5, 113.9), "tpot": (8.11, 8.75, 9.91), "e2e": (1735.0, 3618.0, 4610.0)},
    12: {"ttft": (48.4, 92.5, 133.7), "tpot": (10.73, 12.36, 14.12), "e2e": (2629.0, 4994.0, 6611.0)},
    16: {"ttft": (65.7, 130.9, 197.0), "tpot": (15.25, 19.11, 23.09), "e2e": (3333.0, 7367.0, 9496.0)},
}
_ONLINE_OUT_TOK_S = {6: 1_368.0, 12: 2_675.0, 16: 4_035.0}


def decode_floor_ms(model: str, batch: int) -> float:
    """A decode step that does nothing but read its weights and its KV cache once."""
    return WEIGHTS_MS[model] + batch * MEAN_CONTEXT * KV_BYTES_PER_TOKEN[model] / DEVICE_BYTES_PER_MS


def prefill_floor_ms(model: str, length: int) -> float:
    """One prompt's products and causal attention at the card's peak; reading the weights, if that takes longer."""
    flops = 2 * LAYER_WEIGHTS[model] * length + 2 * ATTENTION_WIDTH[model] * length**2
    return max(WEIGHTS_MS[model], flops / FLOPS_PER_MS)


def metrics(model: str) -> list[Metric]:
    """Everything that is compared for a model, in the order of the table; nothing for a model without figures."""
    if model not in MODELS:
        return []
    found = [
        Metric(
            f"decode_ms_b{batch}",
            f"decode step, batch {batch}",
            "ms",
            vllm,
            _DECODE_TARGETS[model].get(batch),
            decode_floor_ms(model, batch),
        )
        for batch, vllm in zip(BATCHES, _DECODE[model], strict=True)
    ]
    short, long, many = _PREFILL[model]
    offline, azure_tokens, azure_requests, start = _OFFLINE[model]
    offline_target, azure_target, start_target = _OFFLINE_TARGETS[model]
    many_floor, azure_floor = 1e3 * 2048 / prefill_floor_ms(model, 2048), _AZURE_FLOORS[model]
    found += [
        Metric("prefill_ms_1x512", "prefill 1 x 512", "ms", short, None, prefill_floor_ms(model, 512)),
        Metric(
            "prefill_ms_1x2048",
            "prefill 1 x 2048",
            "ms",
            long,
            _PREFILL_TARGETS.get(model),
            prefill_floor_ms(model, 2048),
        ),
        Metric("prefill_tok_s_32x2048", "prefill 32 x 2048", "tokens/s", many, None, many_floor, True),
        Metric(
            "offline256_out_tok_s",
            "offline256",
            "output tokens/s",
            offline,
            offline_target,
            _OFFLINE_FLOOR_TOK_S[model],
            True,
        ),
        Metric("offline256_req_s", "offline256", "requests/s", higher_is_better=True),
        Metric("azure_out_tok_s", "offline Azure conv", "output tokens/s", azure_tokens, None, azure_floor[0], True),
        Metric("azure_req_s", "offline Azure conv", "requests/s", azure_requests, azure_target, azure_floor[1], True),
        Metric("start_s", "start to first output token", "s", start, start_target),
        Metric("idle_pct_b1", "GPU idle between steps, batch 1", "%"),
        *(
            Metric(f"idle_pct_b{batch}", f"GPU idle between steps, batch {batch}", "%", target=IDLE_TARGET_PERCENT)
            for batch in (64, 256)
        ),
    ]
    return found + (_online() if model in ONLINE_MODELS else [])


def _online() -> list[Metric]:
    """The target of a TTFT or a TPOT is to be no worse than vLLM."""
    found = []
    for rate, tables in _ONLINE.items():
        for name, cells in tables.items():
            for percent, vllm in zip(PERCENTILES, cells, strict=True):
                key, label = f"online{rate}_{name}_p{percent}_ms", f"online {rate}/s, {name.upper()} p{percent}"
                found.append(Metric(key, label, "ms", vllm, None if name == "e2e" else vllm))
        key, label, throughput = f"online{rate}_out_tok_s", f"online {rate}/s", _ONLINE_OUT_TOK_S[rate]
        found.append(Metric(key, label, "output tokens/s", throughput, higher_is_better=True))
    return found
