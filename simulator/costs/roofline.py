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


@dataclass(frozen=True, slots=True)
class Sums:
    """Time of one sum over the devices that share a model: a latency, and what each sends over its link.

    A ring sends 2 (N - 1) / N of the message from each of N devices (Patarasuk and Yuan, "Bandwidth optimal all-reduce
    algorithms", JPDC 2009). The latency and the share of the link's peak are from two H100 SXM over NVLink: 8 KB took
    3.6 us with the norm behind it, and 32 MB 139 us in NCCL. For other links they are assumptions.
    """

    latency_ns: int = 4_000
    efficiency: float = 0.54

    def ns(self, num_bytes: float, devices: int, link_bandwidth: float) -> float:
        """`link_bandwidth`: of a device, in one direction, bytes a second at its peak."""
        return self.latency_ns + 2 * (devices - 1) / devices * num_bytes / (link_bandwidth * self.efficiency) * 1e9


class RooflineCost:
    """The device's time is a sum over parts of max(arithmetic, memory), and a launch floor a layer.

    Parts: the linear layers by padded tokens, attention of decodes and of chunks by query-context pairs and by KV
    bytes, the LM head by sampled rows. Activations in memory and tile sizes are left out, so it errs
    on the fast side: on an H100 with Llama-3.1-8B it gives 0.78 to 0.88 of vLLM 0.24's decode steps. Of a mixture of
    experts, a step reads those that its tokens are expected to hit. Swapped KV goes over the host link before the step,
    one direction after the other.

    With `tensor_parallel` N such devices share every layer: each does an Nth, and there are two sums over them in a
    layer, and one for the embedding. Launch floors and the host's time stay as they are.

    `dtype` is that of the arithmetic, `bf16` or `fp32`; by default fp32 where weights take four bytes. Raises
    ValueError for another one.
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
        self.tensor_parallel = tensor_parallel
        self.device = device
        self.overlaps_copies = True  # those to host memory and back are made beside the steps
        self.host = host or HostTimes()
        self.dtype = dtype or ("fp32" if model.bytes_per_weight == 4 else "bf16")
        share_ns = 1e9 / tensor_parallel
        flops_ns = share_ns / device.reached_flops(self.dtype)
        attention_ns = share_ns / device.reached_attention_flops(self.dtype)
        byte_ns = share_ns / device.reached_bandwidth
        self._launch = float(device.launch_ns_per_layer * model.num_layers)
        self._byte = byte_ns
        self._linear_memory = model.linear_bytes * byte_ns
        self._linear_token = model.linear_flops_per_token * flops_ns
        self._head_memory = model.head_bytes * byte_ns
        self._head_sample = model.head_flops_per_sample * flops_ns
        self._pair = model.attention_flops_per_pair * attention_ns
        self._kv_token = model.kv_bytes_per_token * byte_ns
        self._swapped_token = model.kv_bytes_per_token * share_ns / device.reached_host_link
        self._sums = 0 if tensor_parallel == 1 else 2 * model.num_layers + 1

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
        shared = {} if self.tensor_parallel == 1 else {"tensor_parallel": self.tensor_parallel}
        return {
            "kind": "roofline",
            "model": self.model.to_dict(),
            "device": self.device.to_dict(),
            "dtype": self.dtype,
            "prepare_ns": self.host.prepare_ns,
            "finish_ns": self.host.finish_ns,
            "finish_ns_per_sample": self.host.finish_ns_per_sample,
            **shared,
        }

    def _device_ns(self, shape: StepShape) -> int:
        memory = self._linear_memory
        if self.model.num_experts:
            memory = self.model.linear_bytes_read(shape.padded_tokens) * self._byte
        total = self._launch + max(memory, self._linear_token * shape.padded_tokens)
        # A decode is one query over its context; chunks read the KV of their context once for all their queries.
        total += max(self._kv_token, self._pair) * shape.decode_context
        total += max(self._kv_token * shape.chunk_context, self._pair * shape.chunk_pairs)
        if shape.num_samples:
            total += max(self._head_memory, self._head_sample * shape.num_samples)
        if self._sums:
            message = shape.padded_tokens * self.model.hidden_size * (4 if self.dtype == "fp32" else 2)
            link = self.device.peer_link_bandwidth or self.device.host_link_bandwidth
            total += self._sums * Sums().ns(message, self.tensor_parallel, link)
        for swapped in (shape.swapped_out, shape.swapped_in):
            if swapped:
                total += self.device.host_link_latency_ns + self._swapped_token * swapped
        return whole_ns(total)
