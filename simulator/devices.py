"""What a device can do: NVIDIA data sheets, files of the user's, and this machine's CPU, measured."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import yaml


class DeviceError(ValueError):
    """No such device, or a description that is not one. The message is one line and says what to do."""


MAY_BE_ZERO = ("launch_ns_per_layer", "host_link_latency_ns", "peer_link_bandwidth", "tdp_w", "idle_w")


@dataclass(frozen=True, slots=True)
class Device:
    """Peaks as a data sheet states them, and the fractions of them that software reaches.

    The fractions are from one H100 SXM with PyTorch 2.11: 789 TFLOP/s in an 8192 x 8192 x 8192 bf16 product (0.80 of
    the data sheet), 3.11 TB/s of memory read (0.93), 52 to 53 GB/s of pinned copies to and from the host (0.82),
    and prefill attention (FlashAttention 4, 4 prompts of 2048 tokens, paged) at 0.65 of that product's rate. The
    linear layers of Qwen3-0.6B in one CUDA graph took 0.84 ms where reading their weights takes 0.38: 16 us a layer,
    in which kernels start and drain. For other devices these are assumptions. Raises DeviceError.
    """

    name: str
    bf16_flops: float
    """Operations a second of dense bf16 or fp16 products, without sparsity."""
    fp32_flops: float
    memory_bandwidth: float
    """Bytes a second."""
    memory_bytes: int
    host_link_bandwidth: float
    """Bytes a second in one direction."""
    launch_ns_per_layer: int = 16_000
    """The launch floor: time of a layer in a step that does not shrink with its work."""
    matmul_efficiency: float = 0.80
    attention_efficiency: float = 0.53
    """Of prefill attention; decode attention is bound by memory."""
    bandwidth_efficiency: float = 0.93
    host_link_efficiency: float = 0.82
    host_link_latency_ns: int = 20_000
    """Of a step's copies in one direction, before the first byte: an order of magnitude, not a measurement."""
    source: str = ""
    """Where the peaks are from."""
    peer_link_bandwidth: float = 0.0
    """Bytes a second in one direction to another device of the same machine: NVLink; 0: by the host link."""
    tdp_w: float = 0.0
    """Most power that the device draws, in watts (of the data sheet); 0: not known, so that no energy is estimated."""
    disk_read_bandwidth: float = 6.9e9
    """Bytes a second from the machine's disk, and to it: assumed, about those of a PCIe 4.0 drive for servers. No
    measurement."""
    disk_write_bandwidth: float = 4.1e9
    idle_w: float = 0.0
    """Power while it does nothing. No data sheet says it; 0: a tenth of `tdp_w`, which is about what cards report."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name in ("name", "source"):
                if not isinstance(value, str):
                    raise DeviceError(f"a device's {name} must be text, not {value!r}")
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise DeviceError(f"device {self.name!r}: {name} must be a number, not {value!r}")
            if not value and name not in MAY_BE_ZERO:
                raise DeviceError(f"device {self.name!r}: {name} must be above 0")
            if name.endswith("_efficiency") and value > 1:
                raise DeviceError(f"device {self.name!r}: {name} is a fraction of the peak, at most 1, not {value!r}")

    @classmethod
    def from_dict(cls, description: Mapping[str, object]) -> Device:
        """From its fields by name, as `to_dict` gives them. Raises DeviceError for missing and unknown ones."""
        known = [field.name for field in fields(cls)]
        unknown = [name for name in description if name not in known]
        if unknown:
            raise DeviceError(f"a device has no {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
        missing = [name for name in known[:6] if name not in description]
        if missing:
            raise DeviceError(f"a device needs {', '.join(missing)}")
        return cls(**description)  # type: ignore[arg-type]  # __post_init__ checks the values

    def to_dict(self) -> dict[str, object]:
        """Its fields by name, for a run's record."""
        return asdict(self)

    def reached_flops(self, dtype: str) -> float:
        """Operations a second that products reach in `dtype`, `bf16` or `fp32`. Raises DeviceError."""
        if dtype not in ("bf16", "fp32"):
            raise DeviceError(f"no dtype {dtype!r}; there are: bf16 (fp16 is as fast), fp32")
        return self.matmul_efficiency * (self.bf16_flops if dtype == "bf16" else self.fp32_flops)

    def reached_attention_flops(self, dtype: str) -> float:
        """The same for prefill attention."""
        return self.reached_flops(dtype) / self.matmul_efficiency * self.attention_efficiency

    @property
    def reached_bandwidth(self) -> float:
        """Bytes a second that reading memory reaches."""
        return self.memory_bandwidth * self.bandwidth_efficiency

    @property
    def peer_bandwidth(self) -> float:
        """Bytes a second in one direction to another device, as the data sheet has it."""
        return self.peer_link_bandwidth or self.host_link_bandwidth

    @property
    def reached_peer_link(self) -> float:
        """Bytes a second that copies to another device reach: the share of the peak that those to the host reach."""
        return self.peer_bandwidth * self.host_link_efficiency

    def energy_j(self, up_s: float, busy_s: float) -> float | None:
        """An estimate of the energy that it takes to be on for so long and busy for a part of that: power rises from
        `idle_w` to `tdp_w` with the share of time that it is busy (Fan, Weber, Barroso, ISCA 2007). A busy card that
        waits for its memory draws less, so it errs on the high side. None where `tdp_w` is not known."""
        if not self.tdp_w:
            return None
        idle = self.idle_w or self.tdp_w / 10
        return idle * up_s + (self.tdp_w - idle) * busy_s

    @property
    def reached_host_link(self) -> float:
        """Bytes a second that copies to or from host memory reach, one direction at a time."""
        return self.host_link_bandwidth * self.host_link_efficiency


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            "h100-sxm",
            989e12,
            67e12,
            3.35e12,
            80 * 10**9,
            64e9,
            source="NVIDIA H100 Tensor Core GPU data sheet",
            peer_link_bandwidth=450e9,
            tdp_w=700.0,
        ),
        Device(
            "h200",
            989e12,
            67e12,
            4.8e12,
            141 * 10**9,
            64e9,
            source="NVIDIA H200 Tensor Core GPU data sheet",
            peer_link_bandwidth=450e9,
            tdp_w=700.0,
        ),
        Device(
            "a100-80gb",
            312e12,
            19.5e12,
            2.039e12,
            80 * 10**9,
            32e9,
            source="NVIDIA A100 80GB SXM data sheet",
            peer_link_bandwidth=300e9,
            tdp_w=400.0,
        ),
        Device(
            "l4", 121e12, 30.3e12, 300e9, 24 * 10**9, 32e9, source="NVIDIA L4 Tensor Core GPU data sheet", tdp_w=72.0
        ),
    )
}
"""Dense figures. The H100, H200 and L4 sheets print bf16 with 2:4 sparsity (1979, 1979 and 242 TFLOP/s), which is
twice this; all print the PCIe bandwidth of both directions together (128 GB/s, and 64 for the A100 and the L4), and
so NVLink's (900 GB/s, and 600 for the A100)."""


_MARKETED = {"H200": "h200", "H100": "h100-sxm", "A100": "a100-80gb", "L4": "l4"}


def device_like(name: str) -> Device | None:
    """The device that a driver calls so, as "NVIDIA H100 80GB HBM3"; None for one that is not known, as are the PCIe
    versions, which have other limits."""
    words = name.replace("-", " ").split()
    if "PCIe" in words or "PCIE" in words:
        return None
    return next((DEVICES[known] for word, known in _MARKETED.items() if word in words), None)


def load_device(name: str) -> Device:
    """A device by name, `cpu` for this machine's (measured, takes two seconds), or a YAML or JSON file of one.

    Raises DeviceError naming the known devices, or saying what is wrong with the file.
    """
    if name in DEVICES:
        return DEVICES[name]
    if name == "cpu":
        return measured_cpu()
    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise DeviceError(f"no device {name!r}; there are: {', '.join(DEVICES)}, cpu, or a .yaml or .json file of one")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DeviceError(f"device file {name} cannot be read: {error.strerror}") from error
    try:
        description = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise DeviceError(
            f"device file {name} is not valid {path.suffix[1:]}: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(description, dict):
        raise DeviceError(f"device file {name} must hold the fields of one device by name")
    try:
        return Device.from_dict(description)
    except DeviceError as error:
        raise DeviceError(f"device file {name}: {error}") from None


def measured_cpu() -> Device:
    """This machine's CPU through NumPy's BLAS, in under two seconds: products of float32, and reading memory.

    A measurement, rounded to two digits: two calls may differ, so a run's record keeps the device it used. NumPy has
    no bf16, so bf16 is taken as fast as float32. Attention at half a product's speed and 100 us a layer (about
    twenty calls into a framework) are assumptions.
    """
    side = 1024
    square = np.ones((side, side), dtype=np.float32)
    flops = 2 * side**3 / _fastest(lambda: square @ square)
    # 128 MB: more than most caches hold, read the way a decode step reads its weights.
    matrix = np.ones((4096, 8192), dtype=np.float32)
    vector = np.ones(8192, dtype=np.float32)
    bandwidth = matrix.nbytes / _fastest(lambda: matrix @ vector)
    return Device(
        name="cpu",
        bf16_flops=_two_digits(flops),
        fp32_flops=_two_digits(flops),
        memory_bandwidth=_two_digits(bandwidth),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        host_link_bandwidth=_two_digits(bandwidth / 2),  # a copy within memory reads and writes
        launch_ns_per_layer=100_000,
        matmul_efficiency=1.0,
        attention_efficiency=0.5,
        bandwidth_efficiency=1.0,
        host_link_efficiency=1.0,
        source="measured with NumPy on this machine",
    )


def _fastest(work: Callable[[], object], limit_s: float = 0.25) -> float:
    """Seconds of the fastest of the calls that fit into the limit; at least two are made."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < limit_s:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")
