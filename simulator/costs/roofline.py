"""Step times from a model's sizes and a device's data sheet: for hardware that nobody has here.

The roofline model (Williams, Waterman, Patterson, "Roofline: an insightful visual performance model for multicore
architectures", CACM 2009), once for each part of a step: it takes as long as the slower of its arithmetic and its
memory traffic.
"""

from __future__ import annotations

from dataclasses import dataclass

from policies.model_shape import ModelShape
from policies.shapes import StepShape
from simulator.costs.base import StepCost, whole_ns
from simulator.devices import Device


@dataclass(frozen=True, slots=True)
class HostTimes:
    """Host time a step, in nanoseconds. The defaults are an order of magnitude for a Python engine, not a measurement:
    a plan and its inputs in 0.2 ms, a report in 0.1 ms, 2 us for each sampled token that is detokenised and sent."""

    prepare_ns: int = 200_000
    finish_ns: int = 100_000
    finish_ns_per_sample: int = 2_000

    def __post_init__(self) -> None:
        if min(self.prepare_ns, self.finish_ns, self.finish_ns_per_sample) < 0:
            raise ValueError(f"host times must not be negative: {self}")


SUM_LATENCY_NS = 7_000
SUM_EFFICIENCY = 0.55
"""Of a sum over the devices (NCCL in a CUDA graph, two H200 over NVLink): 6.9 us for 16 KiB, 75 for 16 MiB."""


class RooflineCost:
    """The device's time is a sum over parts of max(arithmetic, memory), and a launch floor a layer.

    Parts: the linear layers by padded tokens, attention of decodes and of chunks by query-context pairs and by KV
    bytes, the LM head by sampled rows. Activations in memory and tile sizes are left out, so it errs on the fast side:
    on an H100 with Llama-3.1-8B it gives 0.78 to 0.88 of vLLM 0.24's decode steps. Of a mixture of experts, a step
    reads those that its tokens are expected to hit. Swapped KV goes over the host link before the step, one direction
    after the other.

    With `tensor_parallel` each device has its share of every part (of KV no less than a head), and the activations of
    all tokens are summed over the devices twice a layer and once for the embedding: 2 (n - 1) / n of their bytes over
    the link between devices, and a latency, as measured on two H200.

    `dtype` is that of the arithmetic, `bf16` or `fp32`; by default fp32 where weights take four bytes. Raises
    ValueError for another one, and for fewer devices than one.
    """

    def __init__(
        self,
        model: ModelShape,
        device: Device,
        host: HostTimes | None = None,
        dtype: str | None = None,
        tensor_parallel: int = 1,
    ) -> None:
        if tensor_parallel < 1:
            raise ValueError(f"tensor_parallel must be at least 1, not {tensor_parallel}")
        self.model = model
        self.device = device
        self.host = host or HostTimes()
        self.dtype = dtype or ("fp32" if model.bytes_per_weight == 4 else "bf16")
        self.tensor_parallel = n = tensor_parallel
        flops_ns = 1e9 / device.reached_flops(self.dtype) / n
        attention_ns = 1e9 / device.reached_attention_flops(self.dtype) / n
        byte_ns = 1e9 / device.reached_bandwidth / n
        kv_bytes = model.kv_bytes_per_token * max(1.0, n / model.num_kv_heads)
        self._launch = float(device.launch_ns_per_layer * model.num_layers)
        self._byte = byte_ns
        self._linear_memory = model.linear_bytes * byte_ns
        self._linear_token = model.linear_flops_per_token * flops_ns
        self._head_memory = model.head_bytes * byte_ns
        self._head_sample = model.head_flops_per_sample * flops_ns
        self._pair = model.attention_flops_per_pair * attention_ns
        self._kv_token = kv_bytes * byte_ns
        self._swapped_token = kv_bytes * 1e9 / device.reached_host_link / n
        num_sums = (2 * model.num_layers + 1) if n > 1 else 0
        activation = model.hidden_size * (4 if self.dtype == "fp32" else 2)
        self._sums = float(num_sums * SUM_LATENCY_NS)
        self._sums_token = num_sums * activation * 2 * (n - 1) / n * 1e9 / (SUM_EFFICIENCY * device.peer_bandwidth)

    def cost(self, shape: StepShape) -> StepCost:
        host = self.host
        return StepCost(
            host.prepare_ns, self._device_ns(shape), host.finish_ns + host.finish_ns_per_sample * shape.num_samples
        )

    def step_ns(self, shape: StepShape) -> int:
        return self.cost(shape).total_ns

    def inside(self, shape: StepShape) -> bool:
        """Never: nothing was measured."""
        return False

    def describe(self) -> dict[str, object]:
        return {
            "kind": "roofline",
            "model": self.model.to_dict(),
            "device": self.device.to_dict(),
            "dtype": self.dtype,
            "tensor_parallel": self.tensor_parallel,
            "prepare_ns": self.host.prepare_ns,
            "finish_ns": self.host.finish_ns,
            "finish_ns_per_sample": self.host.finish_ns_per_sample,
        }

    def _device_ns(self, shape: StepShape) -> int:
        memory = self._linear_memory
        if self.model.num_experts:
            memory = self.model.linear_bytes_read(shape.padded_tokens) * self._byte
        total = self._launch + self._sums + self._sums_token * shape.padded_tokens
        total += max(memory, self._linear_token * shape.padded_tokens)
        # A decode is one query over its context; chunks read the KV of their context once for all their queries.
        total += max(self._kv_token, self._pair) * shape.decode_context
        total += max(self._kv_token * shape.chunk_context, self._pair * shape.chunk_pairs)
        if shape.num_samples:
            total += max(self._head_memory, self._head_sample * shape.num_samples)
        for swapped in (shape.swapped_out, shape.swapped_in):
            if swapped:
                total += self.device.host_link_latency_ns + self._swapped_token * swapped
        return whole_ns(total)
